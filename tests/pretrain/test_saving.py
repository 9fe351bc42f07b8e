"""Saves behind training, on full disks, and on request of the scheduler: real files, signals and ranks."""

from __future__ import annotations

import json
import signal

import pytest
from ranks import run_on_ranks
from training_worker import (
    BadModule,
    BadStorage,
    BlockedFolder,
    Fault,
    FullDisk,
    Signalled,
    StalledStorage,
    run_cases,
    small_model,
)

from megatron.pretrain.checkpoint.files import check_file, manifest_of, tracked, usable

LAYOUT = "--pipeline-model-parallel-size 2 --pipeline-schedule helix --save-interval 1"
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
NAN = float("nan")

CASES = {
    "plain": ("", Fault()),
    "async": ("--async-save", Fault()),
    "full": ("", FullDisk(1)),
    "full, go on": ("--on-save-failure continue", FullDisk(0)),
    "full at the end": ("--async-save --on-save-failure continue --train-iters 2", FullDisk(0)),
    "blocked at the end": ("--on-save-failure continue --train-iters 2", BlockedFolder()),
    "broken, async": ("--async-save", BadStorage(0)),
    "broken, async, go on": ("--async-save --on-save-failure continue", BadStorage(1)),
    "stalled": ("", StalledStorage(1, ".distcp", place="write checkpoint")),
    "stalled to the end": (
        "--async-save", StalledStorage(1, ".distcp", iteration=3, place="write checkpoint")
    ),
    "stalled in training": (
        "--async-save --save-interval 2 --train-iters 5", StalledStorage(1, ".distcp", iteration=4)
    ),
    "stalled in publishing": ("--async-save", StalledStorage(0, "manifest")),
    "stalled, then broken": (
        "--async-save", StalledStorage(1, ".distcp", iteration=3, place="write checkpoint", ending="error")
    ),
    "one signalled": ("--save-interval 100", Signalled((1, 2, TERM))),
    "signalled apart": (
        "--async-save --save-interval 100",
        Signalled((0, 1, USR1), (1, 2, TERM), (1, 2, TERM), (0, 2, TERM)),
    ),
    "interrupted": ("--save-interval 100", Signalled((1, 2, INT))),
    "signalled at the end": ("", Signalled((0, 3, TERM))),
    "bad numbers": ("--async-save", BadModule("decoder.layers.0.mlp.linear_fc1", micro_batch=0, value=NAN)),
}  # fmt: skip


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def runs(common, tmp_path_factory):
    """Folder and outcome, by rank, of each case."""
    folders = {name: tmp_path_factory.mktemp("save") for name in CASES}
    cases = [
        (f"{LAYOUT} --save {folders[name]} --metrics-jsonl {folders[name]}.jsonl {options}", fault)
        for name, (options, fault) in CASES.items()
    ]
    by_rank = run_on_ranks(2, run_cases, cases, 1, 2, common)
    return {name: (folders[name], [found[i] for found in by_rank]) for i, name in enumerate(CASES)}


def whole(folder):
    """Iterations of the checkpoints in a folder, each found undamaged, and nothing beside them."""
    assert not list(folder.glob("*.saving"))
    for checkpoint in usable(folder):
        files = manifest_of(checkpoint)
        assert [text for name in files if (text := check_file(checkpoint, name, files[name]))] == []
    found = [int(path.name[5:]) for path in usable(folder)]
    assert tracked(folder).name == f"iter_{found[-1]:07d}"
    return found


def codes(outcomes):
    return [outcome["code"] for outcome in outcomes]


def losses(folder):
    return [json.loads(line)["lm_loss"] for line in open(f"{folder}.jsonl")]


def test_a_save_in_the_background_is_the_same_save(runs):
    folder, outcomes = runs["async"]
    assert codes(outcomes) == [0, 0]
    assert whole(folder) == whole(runs["plain"][0]) == [1, 2, 3]
    assert losses(folder) == losses(runs["plain"][0])
    assert sum(line.startswith("saved checkpoint") for line in outcomes[0]["lines"]) == 3


ERRORS = {"full": "[Errno 28] No space left on device", "broken": "[Errno 5] Input/output error"}


@pytest.mark.parametrize("case", ["full", "broken, async", "stalled, then broken"])
def test_bad_storage_of_one_rank_stops_all(runs, case):
    folder, outcomes = runs[case]
    assert codes(outcomes) == [3, 3]
    rank, error = (0 if case == "broken, async" else 1), ERRORS["full" if "full" in case else "broken"]
    for outcome in outcomes:
        assert outcome["error"].startswith(
            f"the checkpoint of iteration 2 was not saved (rank {rank}: {error}: "
        )
        assert outcome["error"].endswith("those before it are whole")
    assert whole(folder) == [1]
    # In the background it is noticed one iteration later at most.
    assert len(losses(folder)) in ((2, 3) if "," in case else (2,))


@pytest.mark.parametrize("case", ["full, go on", "broken, async, go on"])
def test_bad_storage_can_be_survived(runs, case):
    folder, outcomes = runs[case]
    assert codes(outcomes) == [0, 0]
    (line,) = [line for line in outcomes[0]["lines"] if "was not saved" in line]
    assert "iteration 2" in line
    assert line.endswith("training goes on")
    assert whole(folder) == [1, 3]
    assert losses(folder) == losses(runs["plain"][0])


STALLS = {
    "stalled": ([1, 2, 3], 1, {(2, "save", "write checkpoint")}),
    "stalled to the end": ([1, 2, 3], 1, {(3, "save", "write checkpoint")}),
    "stalled in publishing": (
        [1, 2, 3], 0, {(3, phase, "publish checkpoint") for phase in ("publish", "save")}
    ),
    "stalled, then broken": ([1], 1, {(3, "save", "write checkpoint")}),
}  # fmt: skip


@pytest.mark.parametrize("case", STALLS)
def test_stalled_storage_is_waited_for_in_a_phase_of_its_own(runs, case):
    """What is waited for in a step may not take longer than a step."""
    expected, rank, places = STALLS[case]
    folder, outcomes = runs[case]
    assert codes(outcomes) == ([3, 3] if "broken" in case else [0, 0])
    assert whole(folder) == expected
    assert outcomes[rank]["seen"]
    assert set(outcomes[rank]["seen"]) <= places


def test_training_goes_on_while_storage_stalls(runs):
    folder, outcomes = runs["stalled in training"]
    assert codes(outcomes) == [0, 0]
    assert all(iteration >= 4 for iteration, _, _ in outcomes[1]["seen"])
    assert whole(folder) == [2, 4, 5]
    lines = [line.partition(str(folder))[2] for line in outcomes[0]["lines"] if line.startswith("saved")]
    assert lines == [f"/iter_{iteration:07d}" for iteration in (2, 4, 5)]
    assert len(losses(folder)) == 5


@pytest.mark.parametrize("case", ["full at the end", "blocked at the end"])
def test_the_last_save_must_succeed(runs, case):
    folder, outcomes = runs[case]
    assert codes(outcomes) == [3, 3]
    assert "(rank 0: [Errno " in outcomes[1]["error"]
    if case.startswith("blocked"):
        (folder / "iter_0000002.saving").unlink()
    assert whole(folder) == [1]


@pytest.mark.parametrize(
    ("case", "reason"),
    [("one signalled", "a signal on another rank"), ("signalled apart", "SIGUSR1")],
)
def test_a_signal_saves_and_stops_all_ranks_together(runs, case, reason):
    folder, outcomes = runs[case]
    assert codes(outcomes) == [75, 75]
    last = 2 if case == "one signalled" else 1
    assert whole(folder) == [last]
    line = f"stopped by {reason} after iteration {last}: the same command with --load {folder} goes on"
    assert outcomes[0]["lines"][-1] == f"{line} from there"


def test_ctrl_c_saves_and_is_not_to_be_started_again(runs):
    folder, outcomes = runs["interrupted"]
    assert codes(outcomes) == [130, 130]
    assert whole(folder) == [2]


def test_a_signal_in_the_last_iteration_changes_nothing(runs):
    folder, outcomes = runs["signalled at the end"]
    assert codes(outcomes) == [0, 0]
    assert whole(folder) == [1, 2, 3]


def test_bad_numbers_do_not_cost_the_save_under_way(runs):
    folder, outcomes = runs["bad numbers"]
    assert codes(outcomes) == [6, 6]
    assert whole(folder) == [1]
