"""Checkpoint folders: interrupted at every step, damaged in every way, and never run as code."""

import contextlib
import errno
import json
import os
import pickle
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from job_settings import job_settings
from megatron.core.dist_checkpointing import ShardedTensor
from ranks import run_on_ranks
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from helixpipe.data.whole_file import sync_folder
from helixpipe.reliability.exit_codes import DataError
from megatron.pretrain.checkpoint import publishing
from megatron.pretrain.checkpoint.checkpoint import Loaded, check_tensors, load_checkpoint
from megatron.pretrain.checkpoint.files import (
    FORM,
    LINEAGE,
    MANIFEST,
    TRACKER,
    Saved,
    branch_of,
    check_file,
    digest,
    folder_of,
    id_of,
    lineage_of,
    manifest_of,
    of_another_program,
    share,
    tracked,
    usable,
)
from megatron.pretrain.checkpoint.publishing import (
    JOURNAL,
    finish_publishing,
    publish,
    saving_folder,
    start_saving,
)
from megatron.pretrain.checkpoint.safe_pickle import find_unsafe_content, no_code_from_disk

FILES = {"__0_0.distcp": b"weights" * 1000, ".metadata": b"table", "common.pt": b"", FORM: b"{}"}


TRACKED = object()


def save(root, iteration, keep=None, files=FILES, previous=TRACKED):
    """Save as a job does that goes on from ``previous``, by default from what the tracker names."""
    folder = start_saving(root, iteration)
    for name, content in files.items():
        (folder / name).write_bytes(content + str(iteration).encode())
    digests = {name: digest(folder / name, to_disk=True) for name in files}
    before = tracked(root) if previous is TRACKED else previous
    before = Saved.read(before) if isinstance(before, Path) else before
    return publish(root, iteration, digests, job="test", previous=before, keep=keep).saved.folder


def problems(folder):
    files = manifest_of(folder)
    return [text for text in (check_file(folder, name, found) for name, found in files.items()) if text]


def test_what_is_saved_is_found_whole(tmp_path):
    assert tracked(tmp_path) is None
    folder = save(tmp_path, 10)
    assert folder == tracked(tmp_path) == tmp_path / "iter_0000010"
    assert problems(folder) == []
    assert (tmp_path / TRACKER).read_text() == "10\n"


def test_the_last_ones_are_kept(tmp_path):
    for iteration in (2, 4, 6, 8):
        save(tmp_path, iteration, keep=2)
    assert [path.name for path in usable(tmp_path)] == ["iter_0000006", "iter_0000008"]


def names(root):
    return sorted(path.name for path in root.iterdir() if path.name != TRACKER)


def test_an_iteration_that_is_saved_again_sets_the_abandoned_one_aside(tmp_path):
    first = save(tmp_path, 2)
    save(tmp_path, 4)
    for count in range(2):
        save(tmp_path, 4, files={"other": b"x"}, previous=first)
        assert set(manifest_of(tracked(tmp_path))) == {"other", LINEAGE}
        asides = ["iter_0000004.set-aside", "iter_0000004.set-aside-2"][: count + 1]
        assert names(tmp_path) == ["iter_0000002", "iter_0000004", *asides]


@pytest.mark.parametrize("seed", range(20))
def test_what_a_branch_needs_is_kept_and_nothing_of_another_is_lost(tmp_path, monkeypatch, seed):
    """Random jobs that save, prune, and go back to any checkpoint that is there, or begin anew."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    chance, previous, branch = random.Random(seed), None, []
    for count in range(14):
        here = usable(tmp_path)
        if here and chance.random() < 0.3:
            previous = chance.choice([None, *here])
            branch = branch[: branch.index(previous) + 1] if previous else []
        keep = chance.choice([None, 1, 2, 3])
        iteration = (int(previous.name[5:]) if previous else 0) + chance.randint(1, 3)
        removable = {content(folder) for folder in branch}
        lost = {content(folder) for folder in tmp_path.glob("iter_*")}
        previous = save(tmp_path, iteration, keep, {"content": f"{count} ".encode()}, previous)
        branch = [*branch, previous] if keep is None else [*branch, previous][-keep:]
        # The branch is what can be loaded, as long as was promised; the tracker names its end.
        assert usable(tmp_path) == branch == branch_of(previous)
        assert tracked(tmp_path) == previous
        assert problems(previous) == []
        # Nothing else has lost more than its name.
        lost -= {content(folder) for folder in tmp_path.glob("iter_*")}
        assert lost <= removable
        if keep is None:
            assert not lost


def test_checkpoints_that_people_have_removed_are_not_missed(tmp_path):
    for iteration in (1, 2, 4):
        last = Saved.read(save(tmp_path, iteration))
    shutil.rmtree(folder_of(tmp_path, 4))
    folder = save(tmp_path, 6, previous=last)
    last = Saved.read(folder)
    assert branch_of(folder) == usable(tmp_path) == [folder_of(tmp_path, number) for number in (1, 2, 6)]
    assert tracked(tmp_path) == folder
    for path in usable(tmp_path):
        shutil.rmtree(path)
    assert usable(tmp_path) == []
    assert save(tmp_path, 8, previous=last) == tracked(tmp_path)


def content(folder):
    return (folder / "content").read_text()


def test_a_tracker_that_was_changed_by_hand_wins_over_a_journal(tmp_path):
    for iteration in (2, 4):
        save(tmp_path, iteration)
    journal = tmp_path / JOURNAL
    saved = lineage_of(folder_of(tmp_path, 4)).id
    journal.write_text(json.dumps({"id": saved, "iteration": 4, "tracker": "4\n"}))
    (tmp_path / TRACKER).write_text("2\n")
    finish_publishing(tmp_path)
    assert tracked(tmp_path) == folder_of(tmp_path, 2)
    assert not journal.exists()


def test_a_checkpoint_in_megatrons_old_format_is_refused_with_how_to_convert_it(tmp_path):
    part = folder_of(tmp_path, 5) / "mp_rank_00_001"
    part.mkdir(parents=True)
    (part / "model_optim_rng.pt").touch()
    (tmp_path / TRACKER).write_text("5")
    with pytest.raises(
        DataError, match=r"iter_0000005 was saved as --ckpt-format torch, .* --ckpt-convert-format"
    ):
        tracked(tmp_path)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for iteration in (9_999_999, 10_000_000):
        save(tmp_path, iteration)
    assert [int(folder.name[5:]) for folder in usable(tmp_path)] == [9_999_999, 10_000_000]


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def end_at(monkeypatch, step, error, *, lasts=False):
    """Make the ``step``-th call into the file system fail, and with ``lasts`` all after it; the numbers."""
    calls = iter(range(10**6))

    def counting(function):
        def call(*args, **kwargs):
            number = next(calls)
            if number == step or (lasts and number > step):
                raise error
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", counting(os.fsync))
    for name in ("rename", "replace", "mkdir", "unlink"):
        monkeypatch.setattr(Path, name, counting(getattr(Path, name)))
    monkeypatch.setattr(publishing.shutil, "rmtree", counting(shutil.rmtree))
    return calls


@pytest.mark.parametrize("again", [False, True], ids=["a new iteration", "an iteration that exists"])
def test_a_save_killed_at_any_step_leaves_a_whole_one(tmp_path, monkeypatch, again):
    """Whatever the tracker names afterwards is there and undamaged; the next start cleans up."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    steps = 0
    for step in range(100):
        root = tmp_path / str(step)
        for iteration in (1, 2, 4):
            save(root, iteration)
        if again:
            save(root, 6)
        with pytest.MonkeyPatch.context() as patch:
            end_at(patch, step, Killed())
            try:
                save(root, 6, keep=2, previous=folder_of(root, 4))
            except Killed:
                steps += 1
            else:
                break
        named = [folder_of(root, iteration) for iteration in (4, 6)]
        assert of_another_program(root) is None
        finish_publishing(root)
        assert tracked(root) in named
        assert problems(tracked(root)) == []
        branch = branch_of(tracked(root))
        assert len(branch) >= 2
        assert not any(map(problems, branch))
        save(root, 8)
        assert not [path for ending in ("saving", "removing") for path in root.glob(f"*.{ending}")]
    assert steps > 8


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("again", [False, True], ids=["a new iteration", "an iteration that exists"])
def test_a_save_that_storage_fails_at_any_step_has_not_happened(tmp_path, monkeypatch, again, lasts):
    """The next start goes on from what was there, and never from a branch that was left."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    failures = 0
    for step in range(100):
        root = tmp_path / str(step)
        for iteration in (1, 2, 4, 6)[: 4 if again else 3]:
            save(root, iteration)
        left = id_of(folder_of(root, 6))
        with pytest.MonkeyPatch.context() as patch:
            calls = end_at(patch, step, OSError(errno.EIO, os.strerror(errno.EIO)), lasts=lasts)
            try:
                save(root, 6, keep=2, previous=folder_of(root, 4))
                fails = False
            except OSError:
                fails = True
                with contextlib.suppress(OSError):
                    shutil.rmtree(saving_folder(root, 6))
            if next(calls) <= step:
                break
        failures += fails
        before = tracked(root)
        finish_publishing(root)
        assert problems(tracked(root)) == []
        assert id_of(tracked(root)) != left or (fails and before == tracked(root))
        if fails and not lasts:
            assert tracked(root) == before
            save(root, 8, previous=folder_of(root, 4))
            assert [path.name[-1] for path in usable(root)] == ["1", "2", "4", "8"]
            assert len(list(root.glob("*set-aside*"))) == again
    assert failures > 8


def test_folders_that_cannot_be_brought_to_disk_are_done_without(tmp_path, monkeypatch):
    """As on some file systems over a network: of files it is still asked for."""
    fsync, error = os.fsync, OSError(errno.EINVAL, "bad sync")

    def of_files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise error
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    assert save(tmp_path, 2) == tracked(tmp_path)
    error.errno = errno.EIO
    with pytest.raises(OSError, match="bad sync"):
        sync_folder(tmp_path)


def test_a_tracker_that_is_no_file_is_named(tmp_path):
    save(tmp_path, 2)
    (tmp_path / TRACKER).unlink()
    (tmp_path / TRACKER).mkdir()
    expected = r"txt cannot be read \(Is a directory\); usable: iter_0000002"
    with pytest.raises(DataError, match=expected):
        tracked(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_noticed(tmp_path, name):
    folder = save(tmp_path, 1)
    content = bytearray((folder / name).read_bytes())
    for position in {0, len(content) // 2, len(content) - 1}:
        flipped = bytearray(content)
        flipped[position] ^= 4
        (folder / name).write_bytes(flipped)
        (problem,) = problems(folder)
        assert problem.startswith(f"{folder / name} has another checksum")


def test_files_that_are_cut_swapped_or_linked(tmp_path):
    old, folder = save(tmp_path, 1), save(tmp_path, 2)
    target = folder / "__0_0.distcp"
    whole = target.read_bytes()
    target.write_bytes(whole[:-1])
    assert f"has {len(whole) - 1} bytes instead of {len(whole)}" in problems(folder)[0]
    shutil.copy(old / "__0_0.distcp", target)
    assert "or from another save" in problems(folder)[0]
    target.unlink()
    target.symlink_to(old / "__0_0.distcp")
    assert "is not a plain file" in problems(folder)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "common.pt").unlink(), "common.pt is missing"),
        (lambda folder: (folder / "stray").touch(), "stray does not belong there"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "is damaged or of another checkpoint"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "is damaged or of another checkpoint"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "is damaged or of another checkpoint"),
        (
            lambda folder: (folder / MANIFEST).write_text(
                (folder / MANIFEST).read_text().replace("1,", "2,", 1)
            ),
            "is damaged or of another checkpoint",
        ),
        (
            lambda folder: (folder / MANIFEST).write_text(
                (folder / MANIFEST).read_text().replace("common.pt", "../common.pt")
            ),
            "names '../common.pt', which is not a file of this folder",
        ),
    ],
)
def test_manifests_that_do_not_fit(tmp_path, change, message):
    folder = save(tmp_path, 1)
    change(folder)
    with pytest.raises(ValueError, match=r".") as caught:
        manifest_of(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranks_share_the_files():
    names = [f"file{i}" for i in range(7)]
    shares = [share(names, rank, 3) for rank in range(3)]
    assert sorted(name for mine in shares for name in mine) == names
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Bomb:
    """A pickle that would write a file when it is read."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, name):
    canary = tmp_path / "canary"
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps({"size": torch.Size([2])}))
    torch.save({"iteration": 1}, folder / "common.pt")
    assert find_unsafe_content(folder) == ""
    if name == ".metadata":
        (folder / name).write_bytes(pickle.dumps(Bomb(canary)))
    else:
        torch.save({"iteration": Bomb(canary)}, folder / name)
    assert find_unsafe_content(folder).startswith(
        f"{folder / name} holds more than plain data; do not use it ("
    )
    read = {
        ".metadata": lambda: filesystem.FileSystemReader(folder).read_metadata(),
        "common.pt": lambda: torch.load(folder / name, weights_only=False),
    }
    with no_code_from_disk(), pytest.raises(pickle.UnpicklingError):
        read[name]()
    assert not canary.exists()


def test_outside_torch_reads_as_ever(tmp_path):
    with no_code_from_disk():
        pass
    assert filesystem.pickle is pickle
    torch.save({"path": tmp_path}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=False) == {"path": tmp_path}


@pytest.mark.parametrize("content", [b"", b"\x80", b"no pickle", pickle.dumps(3)[:-1]])
def test_damaged_pickles_end_in_words(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    torch.save({}, tmp_path / "common.pt")
    assert "do not use it" in find_unsafe_content(tmp_path)


def sealed(folder):
    """Give a folder that was tampered with a manifest that fits it again."""
    names = [path.name for path in folder.iterdir() if path.name != MANIFEST]
    content = json.loads((folder / MANIFEST).read_text())
    content["files"] = {name: digest(folder / name)._asdict() for name in names}
    (folder / MANIFEST).write_text(json.dumps(content))
    assert problems(folder) == []


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/b", "..", ".", ""])
def test_names_in_a_manifest_stay_in_the_folder(tmp_path, name):
    folder = save(tmp_path, 1)
    content = json.loads((folder / MANIFEST).read_text())
    content["files"][name] = content["files"].pop("common.pt")
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DataError, match="which is not a file of this folder"):
        manifest_of(folder)


def table(**tensors):
    """A table of contents, as torch.distributed.checkpoint pickles it."""
    return Metadata(
        {
            key: TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(size), [ChunkStorageMetadata(torch.Size([0]), size)]
            )
            for key, (dtype, size) in tensors.items()
        }
    )


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"weight": (torch.float32, torch.Size([8]))}, ""),
        (
            {"weight": (torch.bfloat16, torch.Size([8]))},
            "holds weight as torch.bfloat16 of shape (8,), this job needs torch.float32 of shape (8,)",
        ),
        ({"weight": (torch.float32, torch.Size([10**9]))}, "of shape (1000000000,), this job needs"),
        ({"other": (torch.float32, torch.Size([8]))}, "holds no tensor weight"),
    ],
    ids=["right", "type", "a billion elements", "missing"],
)
def test_a_table_of_contents_must_fit_the_model(tmp_path, saved, message):
    """Even under a manifest that fits: torch would convert types, and allocate what the table says."""
    folder = save(tmp_path, 1)
    (folder / ".metadata").write_bytes(pickle.dumps(table(**saved)))
    sealed(folder)
    assert find_unsafe_content(folder).startswith(f"{folder / 'common.pt'} holds")
    torch.save({}, folder / "common.pt")
    assert find_unsafe_content(folder) == ""
    wanted = {"part": ShardedTensor.from_rank_offsets("weight", torch.zeros(8))}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if message:
        with pytest.raises(DataError) as caught:
            check_tensors(folder, wanted)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    else:
        check_tensors(folder, wanted)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_a_folder_without_checkpoints_is_a_start_only_where_it_is_saved_to(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "iter_0000002.saving").mkdir()
    assert load_checkpoint(job_settings(f"--save {tmp_path}"), tmp_path, state=None) == Loaded()
    with pytest.raises(DataError, match="holds no checkpoint; to start anew leave it out"):
        load_checkpoint(job_settings(f"--save {tmp_path}/other"), tmp_path, state=None)
    with pytest.raises(DataError, match="holds no checkpoint"):
        load_checkpoint(job_settings(), tmp_path / "mistyped", state=None)


def ranks_with_other_trackers(root):
    """What a rank says that sees another tracker than the others, as on a file system that lags."""
    own = root / ("first" if dist.get_rank() == 0 else "second")
    with pytest.raises(DataError) as caught:
        load_checkpoint(job_settings(f"--save {own}"), own, state=None)
    return str(caught.value)


def test_ranks_that_see_different_trackers_stop(tmp_path):
    for iteration in (2, 4):
        save(tmp_path / "first", iteration)
    save(tmp_path / "second", 2)
    for text in run_on_ranks(2, ranks_with_other_trackers, tmp_path):
        assert "ranks see different checkpoints" in text
        assert "rank 0: iter_0000004; rank 1: iter_0000002; it must be a shared folder" in text
