"""Every output has one owner: of jobs at once, after killed ones, and where another host has the lock."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from job_settings import DATASET, MINIMAL, job_settings
from ranks import run_on_ranks
from threads import run_on_threads
from training_worker import Fault, run_cases, small_model

from megatron.pretrain import outputs
from megatron.pretrain.checkpoint.files import FORM, branch_of, digest, lineage_of, tracked, usable
from megatron.pretrain.checkpoint.publishing import publish, start_saving
from megatron.pretrain.health import ownership
from megatron.pretrain.health.ownership import Locks, Owner, Taken, lock_beside, lock_in
from megatron.pretrain.health.rendezvous import job_identity
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.parser import build_parser


@pytest.fixture
def job(monkeypatch):
    """``job(name)``: locks of a job in this process, released at the end."""
    made = []

    def make(name, says=None):
        made.append(Locks(Owner.here(name), (says if says is not None else []).append))
        return made[-1]

    monkeypatch.setattr(ownership, "BEAT_S", 0.05)
    monkeypatch.setattr(ownership, "PATIENCE_S", 0.6)
    monkeypatch.setattr(ownership, "_POLL_S", 0.05)
    yield make
    for locks in made:
        locks.release()


def leave(lock, **changes):
    """A lock that another process has left, or holds."""
    owner = Owner.here("other")._replace(**changes)
    lock.write_text(json.dumps(owner._asdict()) + "\n")
    return owner


def test_a_second_job_is_refused_by_name(job, tmp_path):
    first = job("first")
    first.take(lock_in(tmp_path), f"--save {tmp_path}")
    with pytest.raises(Taken) as refused:
        job("second").take(lock_in(tmp_path), f"--save {tmp_path}")
    assert str(refused.value).startswith(f"--save {tmp_path} is in use by job ")
    assert f"(process {os.getpid()} on host {os.uname().nodename}, since " in str(refused.value)
    assert "\n" not in str(refused.value)
    first.verify()
    first.release()
    assert not list(tmp_path.iterdir())
    job("second").take(lock_in(tmp_path), "--save")


def no_links(*_):
    raise OSError(errno.EPERM, "no links")


def interrupt_after(lines):
    """A trace function that raises what Ctrl-C does once so many lines of the code under test have run."""
    left = lines

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename not in (outputs.__file__, ownership.__file__):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.parametrize("has_links", [True, False])
def test_nothing_is_left_wherever_ctrl_c_comes(tmp_path, monkeypatch, has_links):
    """At every line from the first one to the one that hands over to the job."""
    monkeypatch.setattr(outputs, "agent_store", lambda _: None)
    monkeypatch.setattr(outputs, "job_identity", lambda _: "job")
    monkeypatch.setattr(outputs.dist, "broadcast_object_list", lambda *_, **__: None)
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    settings = job_settings(
        f"--trace-dir {tmp_path}/traces --metrics-jsonl {tmp_path}/metrics --save {tmp_path}/saved"
    )
    before = set(tmp_path.rglob("*"))
    line, interrupted = 0, True
    while interrupted:
        line += 1
        context, interrupted = outputs.own_outputs(settings), False
        sys.settrace(interrupt_after(line))
        try:
            context.__enter__()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(None)
        assert interrupted or set(tmp_path.rglob("*")) > before
        if not interrupted:
            context.__exit__(None, None, None)
        assert set(tmp_path.rglob("*")) == before, f"interrupted at line {line}"
    assert line > 30


def test_other_names_of_a_folder_are_the_same_folder(job, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    job("first").take(lock_in(tmp_path / "real"), "--save real")
    with pytest.raises(Taken):
        job("second").take(lock_in(tmp_path / "link"), "--save link")


KILLED = """
import os, sys
from pathlib import Path
from megatron.pretrain.health.ownership import Locks, Owner
Locks(Owner.here("killed"), print).take(Path(sys.argv[1]), "--save")
os.kill(os.getpid(), 9)
"""


def test_a_killed_owner_is_seen_even_before_it_is_buried(job, tmp_path):
    lock, says = lock_in(tmp_path), []
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(lock)])
    while not lock.exists() or os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        assert process.returncode is None
        time.sleep(0.02)
    job("next", says).take(lock, "--save DIR")
    assert process.wait() == -9
    (line,) = says
    assert line.startswith("--save DIR was left by job ")
    assert f"process {process.pid} " in line


def test_another_process_of_the_same_number_is_not_the_owner(job, tmp_path):
    leave(lock_in(tmp_path), started="1")
    job("next").take(lock_in(tmp_path), "--save")


ELSEWHERE = {"host": "elsewhere", "boot": "an earlier one", "namespace": "pid:[1]"}


@pytest.mark.parametrize("field", ELSEWHERE)
def test_an_owner_that_cannot_be_seen_is_believed_in_while_it_touches_its_lock(job, tmp_path, field):
    lock, says = lock_in(tmp_path), []
    leave(lock, **{field: ELSEWHERE[field]})
    ended = threading.Event()

    def touch():
        while not ended.wait(0.1):
            os.utime(lock)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(Taken):
            job("next", says).take(lock, "--save")
    finally:
        ended.set()
        thread.join()
    job("next", says).take(lock, "--save")
    assert [line.split(" by ")[0] for line in says] == [
        "--save is owned", "--save is owned", "--save was left"
    ]  # fmt: skip


def test_a_lock_is_touched(job, tmp_path):
    lock = lock_in(tmp_path)
    job("first").take(lock, "--save")
    before, end = lock.stat().st_mtime_ns, time.monotonic() + 20
    while lock.stat().st_mtime_ns == before:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ranks_that_torchrun_has_started_again_own_what_they_owned(job, tmp_path):
    leave(lock_in(tmp_path), job="same", host="elsewhere", process=1)
    started = time.monotonic()
    job("same").take(lock_in(tmp_path), "--save")
    assert time.monotonic() - started < ownership.PATIENCE_S


@pytest.mark.parametrize("content", ["", "{", "[]", '{"job": 1}', "null", "[" * 100_000], ids=range(6))
def test_a_lock_without_an_owner_is_left_to_people(job, tmp_path, content):
    lock_in(tmp_path).write_text(content)
    with pytest.raises(Taken, match="names no owner; remove it if no job writes there"):
        job("next").take(lock_in(tmp_path), "--save")


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("is_left", [True, False])
def test_of_many_that_come_at_once_one_owns(job, tmp_path, monkeypatch, has_links, is_left):
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    for attempt in range(10):
        lock = tmp_path / f"{attempt}.json"
        if is_left:
            leave(lock, started="1")
        everyone = [job(f"{attempt} {number}") for number in range(6)]
        barrier = threading.Barrier(6)

        def take(rank, everyone=everyone, lock=lock, barrier=barrier):
            barrier.wait()
            try:
                everyone[rank].take(lock, "--save")
                return True
            except Taken:
                return False

        owns = run_on_threads(6, take)
        assert any(owns)
        still = []
        for locks, is_owner in zip(everyone, owns, strict=True):
            try:
                locks.verify()
                still.append(is_owner)
            except OSError:
                continue
        assert sum(still) == 1


def test_an_owner_that_was_believed_to_be_gone_is_told(job, tmp_path):
    first, lock = job("first"), lock_in(tmp_path)
    first.take(lock, "--save DIR")
    lock.unlink()
    with pytest.raises(OSError, match="--save DIR has been taken over by another job"):
        first.verify()
    leave(lock)
    with pytest.raises(OSError, match=r"--save DIR has been taken over by job .* on host"):
        first.verify()
    first.release()
    assert lock.exists()


# Options that name what is written, and where the lock of another job then is.
OWNED = {
    "--save": lock_in,
    "--trace-dir": lock_in,
    "--tensorboard-dir": lock_in,
    "--metrics-jsonl": lock_beside,
    "--memory-snapshot-path": lock_beside,
}
# What is read; what many jobs may write to, a folder or a file name for each; what is written at an end.
NOT_OWNED = {
    "--load", "--pretrained-checkpoint", "--plan", "--elastic-costs", "--data-args-path",
    "--per-split-data-args-path", "--data-cache-path", "--wandb-save-dir", "--failure-dir",
}  # fmt: skip


@pytest.mark.parametrize("flag", OWNED)
def test_every_output_has_one_owner(flag, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "agent_store", lambda _: None)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: None)
    path = tmp_path / "output"
    if OWNED[flag] is lock_in:
        path.mkdir()
    more = "--record-memory-history" if flag == "--memory-snapshot-path" else ""
    # The package tensorboard need not be there.
    settings = parse_arguments(f"{MINIMAL} {flag} {path} {more}".split(), DATASET, makes_folders=False)
    leave(OWNED[flag](path), process=os.getpid())
    with pytest.raises(Taken, match=f"^{flag} {path} is in use by job "), outputs.own_outputs(settings):
        pass
    OWNED[flag](path).unlink()
    with outputs.own_outputs(settings):
        assert OWNED[flag](path).exists()
    assert not OWNED[flag](path).exists()


def test_what_a_killed_save_has_left_is_no_checkpoint_of_another_program(tmp_path, monkeypatch):
    """Written whole, but for the manifest; or half removed."""
    monkeypatch.setattr(outputs, "agent_store", lambda _: None)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: None)
    settings = job_settings(f"--save {tmp_path}")

    def write(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / FORM).write_text("{}")

    for name in ("iter_0000007.saving", "iter_0000001.removing", "iter_0000002.set-aside"):
        write(name)
    with outputs.own_outputs(settings):
        pass
    write("iter_0000003")
    with pytest.raises(ValueError, match="holds iter_0000003 of another"), outputs.own_outputs(settings):
        pass


def test_no_output_is_forgotten():
    paths = {action.option_strings[0] for action in build_parser()._actions if action.type is Path}
    assert paths == OWNED.keys() | NOT_OWNED


def test_a_job_keeps_its_name_in_torchruns_store():
    store, other = dist.HashStore(), dist.HashStore()
    assert job_identity(store) == job_identity(store)
    assert len({job_identity(place) for place in (store, other, None, None)}) == 4


@pytest.mark.parametrize("loads_elsewhere", [False, True])
def test_a_job_that_torchrun_starts_again_knows_what_it_has_saved(tmp_path, monkeypatch, loads_elsewhere):
    """From the checkpoint itself: killed a moment after the tracker was written, it does not start anew."""
    store = dist.HashStore()
    monkeypatch.setattr(outputs, "agent_store", lambda _: store)
    load = tmp_path / "elsewhere" if loads_elsewhere else None
    settings = job_settings(f"--save {tmp_path}" + (f" --load {load}" if loads_elsewhere else ""))
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: None)
    with outputs.own_outputs(settings) as first:
        assert first.load == load
        folder = start_saving(tmp_path, 1)
        (folder / "weights").write_bytes(b"weights")
        digests = {"weights": digest(folder / "weights")}
        publish(tmp_path, 1, digests, job=first.job, previous=None, keep=None)
    with outputs.own_outputs(settings) as second:
        assert (second.job, second.load) == (first.job, tmp_path)
    store = dist.HashStore()
    with pytest.raises(ValueError, match="holds checkpoints of another job"), outputs.own_outputs(settings):
        pass


class SecondJob(Fault):
    """Another job has come to own the folder of --save when iteration 2 has been computed."""

    def on_step(self):
        if self.iteration == 2:
            lock_in(self.settings.checkpoint.save).unlink()
            leave(lock_in(self.settings.checkpoint.save))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Outcomes of jobs in this order, and their root."""
    common, root = small_model(tmp_path_factory.mktemp("corpus")), tmp_path_factory.mktemp("jobs")
    a, b, taken = root / "a", root / "b", root / "taken"
    root.joinpath("held").mkdir()
    leave(lock_in(root / "held"), process=os.getpid())
    cases = {
        "a": f"--save {a} --save-interval 1 --metrics-jsonl {root}/m.jsonl",
        "anew": f"--save {a} --train-iters 2",
        "set aside": f"--save {a} --set-aside-checkpoints --train-iters 2 --metrics-jsonl {root}/m.jsonl",
        "from a": f"--save {b} --load {a} --train-iters 3",
        "from a again": f"--save {b} --load {a} --train-iters 4",
        "go on": f"--save {b} --load {root}/jobs/../b --train-iters 4",
        "taken": f"--save {taken} --save-interval 1 --on-save-failure continue",
        "held": f"--save {root}/held --train-iters 4",
    }
    (root / "jobs").mkdir()
    faults = {"taken": SecondJob()}
    (outcomes,) = run_on_ranks(
        1, run_cases, [(line, faults.get(name, Fault())) for name, line in cases.items()], 1, 1, common
    )
    return root, dict(zip(cases, outcomes, strict=True))


def test_a_fresh_job_in_a_used_folder_is_refused_unless_told(jobs):
    root, outcomes = jobs
    assert outcomes["a"]["code"] == 0
    assert outcomes["anew"]["code"] == 2
    assert outcomes["anew"]["error"] == (
        f"--save {root}/a holds checkpoints of another job, up to iter_0000003: give --load {root}/a to go "
        "on from them, another folder, or --set-aside-checkpoints to keep them under other names"
    )
    assert outcomes["set aside"]["code"] == 0
    assert [folder.name for folder in usable(root / "a")] == ["iter_0000002"]
    assert sorted(path.name for path in root.glob("a/*.set-aside")) == [
        f"iter_{iteration:07d}.set-aside" for iteration in (1, 2, 3)
    ]


def test_metrics_of_an_abandoned_branch_are_kept(jobs):
    root, _ = jobs
    iterations = [json.loads(line)["iteration"] for line in (root / "m.jsonl").read_text().splitlines()]
    aside = [json.loads(line)["iteration"] for line in (root / "m.jsonl.set-aside").read_text().splitlines()]
    assert (iterations, aside) == ([1, 2], [1, 2, 3])


def test_a_job_that_loads_elsewhere_does_not_take_its_own_checkpoints_for_anothers(jobs):
    root, outcomes = jobs
    assert [outcomes[name]["code"] for name in ("from a", "from a again", "go on")] == [0, 2, 0]
    assert tracked(root / "b").name == "iter_0000004"
    assert [folder.name for folder in branch_of(tracked(root / "b"))] == ["iter_0000003", "iter_0000004"]
    assert len({lineage_of(folder).job for folder in usable(root / "b")}) == 2


def test_a_job_whose_folder_was_taken_over_writes_nothing_more_there(jobs):
    root, outcomes = jobs
    assert outcomes["taken"]["code"] == 3
    assert "has been taken over by job" in outcomes["taken"]["error"]
    assert [folder.name for folder in usable(root / "taken")] == ["iter_0000001"]


def test_a_folder_in_use_is_refused_before_the_model_is_built(jobs):
    root, outcomes = jobs
    assert outcomes["held"]["code"] == 2
    assert outcomes["held"]["error"].startswith(f"--save {root}/held is in use by job ")
    assert [path.name for path in (root / "held").iterdir()] == ["owner.json"]
