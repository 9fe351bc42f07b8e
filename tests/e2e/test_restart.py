"""Jobs that are killed and preempted while torchrun watches: they end with the losses of an unbroken run."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from jobs import MODEL, ROOT, free_port, metrics_of, run
from ranks import run_on_ranks
from training_worker import Signalled, run_cases

from megatron.pretrain.checkpoint.files import TRACKER, tracked

LEARNED = ("iteration", "lm_loss", "grad_norm", "learning_rate")
# Dropout draws from the random states of tensor- and pipeline-parallel ranks.
LAYOUTS = {
    2: ("--pipeline-schedule", "helix", "--pipeline-model-parallel-size", "2"),
    4: (
        "--pipeline-schedule", "1f1b", "--pipeline-model-parallel-size", "2",
        "--tensor-model-parallel-size", "2", "--use-distributed-optimizer",
    ),
}  # fmt: skip
DEADLINE_S = 200
# Signals do not reach all ranks in the same iteration.
STOPPED = "stopped by (SIGTERM|a signal on another rank) after iteration {iteration}: the same command with"


class Job:
    """pretrain_gpt.py under torchrun, to be disturbed; killed with all it has started when it is left."""

    def __init__(self, corpus: Path, folder: Path, ranks: int, iterations: int, restarts: int, *more: str):
        self.metrics, self.saved = folder / "metrics.jsonl", folder / "saved"
        self.command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "--max-restarts", str(restarts), "pretrain_gpt.py", *MODEL, "--data-path", str(corpus),
            *LAYOUTS[ranks], "--hidden-dropout", "0.1", "--train-iters", str(iterations),
            "--lr-decay-iters", str(iterations), "--metrics-jsonl", str(self.metrics), "--save",
            str(self.saved), *more,
        ]  # fmt: skip
        # What makes restarts work for those who know it; here they must work without.
        kept = {name: v for name, v in os.environ.items() if name != "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}
        self.output = folder / "output"
        with self.output.open("w") as stream:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.end = time.monotonic() + DEADLINE_S

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started():
            process.kill()
        self.process.kill()
        self.process.wait()

    def wait_for_iteration(self, iteration: int) -> bool:
        """True once the metrics reach it; False if the job has ended before."""
        return self.wait_until(
            lambda: self.metrics.exists() and len(self.metrics.read_text().splitlines()) >= iteration
        )

    def wait_until(self, holds: Callable[[], bool]) -> bool:
        """True once it holds; False if the job has ended before."""
        while self.process.poll() is None:
            assert time.monotonic() < self.end, self.output.read_text()
            if holds():
                return True
            time.sleep(0.01)
        return False

    def wait(self) -> int:
        return self.process.wait(timeout=max(1.0, self.end - time.monotonic()))

    def ranks(self) -> dict[int, psutil.Process]:
        found = {}
        for process in self._started():
            try:
                rank = process.environ().get("RANK")
                if rank is not None and process.parent().pid == self.process.pid:
                    found[int(rank)] = process
            except (psutil.NoSuchProcess, AttributeError):
                continue
        return found

    def _started(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def learned(path):
    return [tuple(row[key] for key in LEARNED) for row in metrics_of(path)]


def test_killed_and_preempted_it_goes_on_as_if_unbroken(corpus, tmp_path):
    """One job: a rank dies once there is a checkpoint, torchrun starts again, and the scheduler stops it."""
    iterations, moments = 400, random.Random(1)
    options = ("--save-interval", "2", "--async-save", "--keep-checkpoints", "2")
    with Job(corpus, tmp_path, 2, iterations, 1, *options) as job:
        # The tracker's file comes a moment before the job remembers that it has saved.
        assert job.wait_until(lambda: "saved checkpoint" in job.output.read_text()), job.output.read_text()
        time.sleep(moments.random() * 0.2)
        victims = job.ranks()
        lost = moments.choice(sorted(victims))
        victims[lost].send_signal(signal.SIGKILL)
        victims[lost].wait()
        assert job.wait_until(lambda: "going on from iteration" in job.output.read_text())
        going_on = int(re.search(r"going on from iteration (\d+) of", job.output.read_text())[1])
        assert job.wait_for_iteration(going_on + 5), job.output.read_text()
        for process in job.ranks().values():
            process.send_signal(signal.SIGTERM)
        assert job.wait() == 1
    output, found = job.output.read_text(), learned(job.metrics)
    culprit = rf"rank {lost} \(stage {lost}, host .*\) was lost \(killed, crashed or cut off\): step \d+, "
    assert len(re.findall(rf"^pretrain_gpt: error: {culprit}.*; last completed: rank 0: ", output, re.M)) == 1
    other = rf"^pretrain_gpt: rank {1 - lost}: error: {culprit}.*; this rank: step \d+, "
    assert len(re.findall(other, output, re.M)) == 1
    stopped = len(found)
    assert going_on + 5 <= stopped < iterations
    assert re.search(STOPPED.format(iteration=stopped), output)
    # Of the two ranks of the second start.
    assert re.findall(r"exitcode +: (-?\d+)", output) == ["75", "75"]
    assert sorted(path.name for path in job.saved.glob("iter_*")) == [
        f"iter_{iteration:07d}" for iteration in ((stopped - 1) // 2 * 2, stopped)
    ]
    assert tracked(job.saved).name == f"iter_{stopped:07d}"
    assert found == unbroken(job, stopped, tmp_path / "unbroken.jsonl")


def unbroken(job, iterations, metrics):
    """What the same command has learned after some iterations without a break, in this test's own ranks."""
    script = job.command.index("pretrain_gpt.py")
    arguments = [word for word in job.command[script + 1 :] if word not in ("--async-save",)]
    for option in ("--save", "--metrics-jsonl", "--save-interval", "--keep-checkpoints"):
        del arguments[arguments.index(option) : arguments.index(option) + 2]
    case = (f"--metrics-jsonl {metrics}", Signalled((0, iterations, signal.SIGTERM)))
    (outcome,), _ = run_on_ranks(2, run_cases, [case], 1, 2, " ".join(arguments))
    assert outcome["code"] == 75, outcome
    return learned(metrics)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_random_moments_it_ends_as_if_unbroken(corpus, tmp_path):
    ranks, kills, moments = 4, 10, random.Random(2)
    iterations = 6 * kills + 4
    (tmp_path / "whole").mkdir()
    with Job(corpus, tmp_path / "whole", ranks, iterations, 0) as whole:
        assert whole.wait() == 0, whole.output.read_text()
    (tmp_path / "broken").mkdir()
    with Job(
        corpus, tmp_path / "broken", ranks, iterations, kills, "--save-interval", "2", "--async-save",
        "--keep-checkpoints", "2",
    ) as broken:  # fmt: skip
        broken.end += 15 * kills
        for kill in range(kills):
            # A later one each time, so that every restart has work left.
            assert broken.wait_for_iteration(6 * kill + moments.randint(1, 6)), broken.output.read_text()
            time.sleep(moments.random() * 0.1)
            victims = broken.ranks()
            victim = victims[moments.choice(sorted(victims))]
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        assert broken.wait() == 0, broken.output.read_text()
    assert learned(broken.metrics) == learned(whole.metrics)
    assert len(learned(whole.metrics)) == iterations
    assert (broken.saved / TRACKER).read_text() == f"{iterations}\n"
    assert broken.output.read_text().count("going on from iteration") >= 1


@pytest.mark.slow
def test_preempted_it_saves_and_the_same_command_goes_on(corpus, tmp_path):
    """torchrun passes SIGTERM to the process group of every rank, readers of data included, and again."""
    iterations = 400
    options = ("--num-workers", "1", "--save-interval", "1000", "--load", str(tmp_path / "saved"))
    with Job(corpus, tmp_path, 2, iterations, 3, *options) as job:
        assert job.wait_for_iteration(3), job.output.read_text()
        job.process.send_signal(signal.SIGTERM)
        for process in job.ranks().values():
            process.send_signal(signal.SIGTERM)
        code = job.wait()
    output = job.output.read_text()
    assert code != 0
    stopped = len(learned(job.metrics))
    assert 3 <= stopped < iterations
    assert re.search(STOPPED.format(iteration=stopped), output)
    assert tracked(job.saved).name == f"iter_{stopped:07d}"
    with Job(corpus, tmp_path, 2, iterations, 0, *options) as job:
        assert job.wait_for_iteration(stopped + 1), job.output.read_text()
    assert f"going on from iteration {stopped} of" in job.output.read_text()


@pytest.mark.slow
def test_preempted_alone_it_exits_with_75(corpus, tmp_path):
    """SIGUSR1, and SIGTERM on its heels, while it trains."""
    metrics, saved = tmp_path / "metrics.jsonl", tmp_path / "saved"
    (tmp_path / "sitecustomize.py").write_text(
        f"""import os, signal, sys, threading, time
def interrupt():
    while not os.path.exists({str(metrics)!r}) or open({str(metrics)!r}).read().count("\\n") < 2:
        time.sleep(0.01)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        os.kill(os.getpid(), number)
if "pretrain_gpt.py" in sys.orig_argv:  # not in the processes that it starts
    threading.Thread(target=interrupt, daemon=True).start()
"""
    )
    command = [sys.executable, "pretrain_gpt.py", *MODEL, "--data-path", str(corpus), "--train-iters", "1000"]
    command += ["--save", str(saved), "--metrics-jsonl", str(metrics), "--async-save"]
    finished = run(command, 60, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", MASTER_PORT=str(free_port()))
    assert finished.code == 75, finished.errors
    assert finished.errors == ""
    stopped = len(metrics_of(metrics))
    assert finished.output.splitlines()[-2] == f"saved checkpoint {tracked(saved)}"
    assert finished.output.splitlines()[-1].startswith(f"stopped by SIGUSR1 after iteration {stopped}: ")
    assert tracked(saved).name == f"iter_{stopped:07d}"


@pytest.mark.parametrize(
    "sign", ["owner.json", pytest.param("metrics", marks=pytest.mark.slow)], ids=["building", "training"]
)
def test_ctrl_c_at_a_terminal_is_one_line(corpus, tmp_path, sign):
    """SIGINT to the whole foreground group, sentinels included, once the sign of a phase is there."""
    metrics, saved = tmp_path / "metrics.jsonl", tmp_path / "saved"
    command = [
        sys.executable,
        "pretrain_gpt.py",
        *MODEL,
        "--data-path",
        str(corpus),
        "--train-iters",
        "100000",
    ]
    command += ["--save", str(saved), "--metrics-jsonl", str(metrics)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port())}
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    is_there = {
        "owner.json": (saved / sign).exists,
        "metrics": lambda: metrics.exists() and metrics.read_text(),
    }
    try:
        end = time.monotonic() + 60
        while not is_there[sign]():
            assert time.monotonic() < end
            assert job.poll() is None, job.communicate()
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGINT)
        output, errors = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 130, errors
    if sign == "metrics":
        assert errors == ""
        assert output.splitlines()[-1].startswith("stopped by SIGINT after iteration ")
        assert tracked(saved).name == f"iter_{len(metrics_of(metrics)):07d}"
    else:
        assert errors == "pretrain_gpt: stopped by SIGINT before the first iteration\n"
        assert list(saved.iterdir()) == []
