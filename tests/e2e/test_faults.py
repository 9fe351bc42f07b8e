"""Faults of one rank, with real processes and real signals: the culprit is named, and nothing is left.

The fault happens at an exact place, see ``tests/support/faulty_pretrain.py``; docs/faults.md has the table of
what the user sees.
"""

from __future__ import annotations

import re
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from jobs import metrics_of

from megatron.pretrain.checkpoint.files import tracked

HELIX = ("--pipeline-schedule", "helix", "--pipeline-model-parallel-size", 2)
ONE_F_ONE_B = ("--pipeline-schedule", "1f1b", "--pipeline-model-parallel-size", 2)
FAULTY = Path(__file__).resolve().parents[1] / "support" / "faulty_pretrain.py"


class Ended(NamedTuple):
    """How a job ended: our lines on stderr by rank, None for the job's own, and exit codes by rank."""

    lines: dict[int | None, list[str]]
    codes: dict[int, int]
    errors: str


@pytest.fixture
def end_of(launch, tmp_path):
    """``end_of(fault, *arguments)``: run two ranks into a fault; fails if a process is left behind."""

    def run(fault, *arguments):
        mark = uuid.uuid4().hex
        finished = launch(
            2, *arguments, "--failure-dir", tmp_path / "failures", script=FAULTY, timeout_s=90,
            FAULT=fault, FAULT_MARK=str(tmp_path / "waits"), HELIXPIPE_TEST_RUN=mark,
        )  # fmt: skip
        assert finished.code != 0
        lines = {}
        for line in finished.errors.splitlines():
            match = re.match(r"pretrain_gpt: (?:rank (\d+): )?error: (.*)", line)
            if match:
                rank = None if match[1] is None else int(match[1])
                lines.setdefault(rank, []).append(match[2])
        assert_nothing_runs(mark)
        return Ended(lines, exit_codes(finished.errors), finished.errors)

    return run


def exit_codes(errors):
    """By rank, from torchrun's report."""
    found = re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", errors)
    return {int(rank): int(code) for rank, code in found}


def assert_nothing_runs(mark, within_s=5.0):
    end = time.monotonic() + within_s
    while left := [process for process in psutil.process_iter() if is_marked(process, mark)]:
        assert time.monotonic() < end, f"left behind: {[process.cmdline() for process in left]}"
        time.sleep(0.1)


def is_marked(process, mark):
    try:
        return process.environ().get("HELIXPIPE_TEST_RUN") == mark
    except psutil.Error:
        return False


def assert_one_line(ended, rank, *words):
    (line,) = ended.lines[rank]
    for word in words:
        assert word in line, line


BACKWARD = "7B3 (backward of segment 7, micro batch 3)"
# In the third step, when rank 0 can do nothing more without the result of that backward.
WITH_WAIT = "1 3 B 5RECV_B3@1"
WAITS = (
    "for the gradient of micro batch 3 after segment 5 from rank 1 (5RECV_B3@1); last completed 6SEND_B0@1"
)


@pytest.mark.slow
def test_a_killed_rank_is_named_by_all_others(end_of):
    ended = end_of(f"kill {WITH_WAIT}", *HELIX)
    culprit = ("rank 1 (stage 1, host ", "was lost", "step 3", BACKWARD)
    assert_one_line(ended, None, *culprit, "last completed: rank 0: 6SEND_B0@1 (step 3), rank 1: ")
    assert_one_line(ended, 0, *culprit, "this rank: step 3, waiting", WAITS)
    assert set(ended.lines) == {None, 0}
    assert ended.codes == {0: 4, 1: -9}


def stacks_of(rank, folder):
    (path,) = folder.glob(f"stacks_*_rank_{rank}.txt")
    return path.read_text()


def test_a_stopped_rank_is_told_from_the_one_that_waits_for_it(end_of, tmp_path):
    ended = end_of(f"stop {WITH_WAIT}", *HELIX)
    assert_one_line(ended, None, "hang: rank 1 (stage 1, host ", "is stopped", BACKWARD, "held up: rank 0;")
    assert_one_line(ended, 0, "hang: stage 0, step 3, waiting", WAITS)
    assert_one_line(ended, 1, "hang: stage 1, step 3", BACKWARD)
    assert ended.codes == {0: 5, 1: 5}
    for rank in (0, 1):
        # A rank that has been stopped goes on to write them, and the one that waits for it may then, too.
        assert "in train_iteration" in stacks_of(rank, tmp_path / "failures")


@pytest.mark.slow
def test_an_error_in_a_layer_is_shown_once_and_named_by_all_others(end_of):
    ended = end_of(f"raise {WITH_WAIT}", *HELIX)
    assert_one_line(ended, 1, "ArithmeticError: a layer failed", "step 3", BACKWARD)
    failure = ("rank 1 (stage 1, host ", "failed: ArithmeticError: a layer failed", BACKWARD)
    assert_one_line(ended, 0, *failure, "this rank: step 3, waiting", WAITS)
    assert ended.codes == {0: 4, 1: 1}
    assert ended.errors.count("raise ArithmeticError") == 1


@pytest.mark.slow
def test_arguments_that_differ_are_refused_with_both_values(end_of):
    ended = end_of("differ 1 0 -", *HELIX)
    for rank in (0, 1):
        assert_one_line(ended, rank, "--seq-length is 128 on rank 0, 64 on rank 1", "same command")
    assert ended.codes == {0: 2, 1: 2}


@pytest.mark.slow
def test_memory_that_runs_out_is_named_with_its_operation(end_of):
    ended = end_of("oom 0 3 F", *HELIX)
    failure = ("out of memory on pipeline rank 0, 0F0, the forward", "asked for 20.00 GiB; to need less: ")
    assert_one_line(ended, 0, *failure)
    assert_one_line(ended, 1, "rank 0 (stage 0, host ", *failure, "this rank: step 3")
    assert ended.codes == {0: 7, 1: 4}


@pytest.mark.slow
def test_a_rank_that_holds_the_interpreter_is_named_and_its_stack_written(end_of, tmp_path):
    ended = end_of("hold 1 3 B", *HELIX)
    assert_one_line(ended, None, "rank 1 ", "hangs inside a call that does not let Python run", BACKWARD)
    assert_one_line(ended, 1, "hang: stage 1, step 3", BACKWARD)
    # It cannot end itself.
    assert ended.codes == {0: 5, 1: -9}
    assert "in _hold_interpreter" in stacks_of(1, tmp_path / "failures")


@pytest.mark.slow
def test_a_message_that_is_too_short_is_refused_by_its_receiver(end_of):
    """gloo delivers it as if it were whole."""
    ended = end_of("half 1 3 B", *HELIX)
    # Of attention's output and the residual, 128 x 64 each.
    assert_one_line(ended, 0, "is not what the plan expects: got 8192 elements", "expected 16384 elements")
    assert_one_line(ended, 1, "rank 0 (stage 0, host ", "failed: message")
    assert ended.codes == {0: 2, 1: 4}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stop", "sleep"])
def test_megatrons_own_schedule_is_watched_too(end_of, kind):
    ended = end_of(f"{kind} 0 3 F", *ONE_F_ONE_B)
    symptom = "is stopped" if kind == "stop" else "does not go on"
    assert_one_line(ended, None, "hang: rank 0 ", symptom, "0F0 (forward of segment 0, micro batch 0)")
    assert_one_line(ended, 1, "hang: stage 1, step 3", "between operations", "last completed")
    assert ended.codes == {0: 5, 1: 5}


@pytest.mark.slow
def test_a_collective_that_nobody_can_leave_ends_all_the_same(end_of):
    """The other tensor-parallel rank is blocked inside gloo."""
    ended = end_of("stop 1 3 F", "--tensor-model-parallel-size", 2)
    assert_one_line(ended, None, "hang: rank 1 ", "is stopped", "0F0")
    assert_one_line(ended, 0, "hang: stage 0, step 3", "0F0")
    assert ended.codes == {0: 5, 1: 5}


@pytest.mark.slow
def test_storage_that_never_answers_is_named_once_it_is_waited_for(end_of, tmp_path):
    """Not before: training goes on beside the save. Other phases of the program get their time, too."""
    saved = tmp_path / "saved"
    ended = end_of(
        "stall 1 2 -", *HELIX, "--save", saved, "--save-interval", 2, "--async-save", "--hang-timeout-s", 20,
        "--metrics-jsonl", tmp_path / "metrics.jsonl",
    )  # fmt: skip
    place = ("step 4", "in phase 'write checkpoint'")
    late = "has not arrived where the others wait"
    assert_one_line(ended, None, "hang: rank 1 (stage 1, host ", late, *place)
    assert_one_line(ended, 0, "hang: stage 0, step 4", "in phase 'publish checkpoint'")
    assert_one_line(ended, 1, "hang: stage 1", *place)
    assert ended.codes == {0: 5, 1: 5}
    assert len(metrics_of(tmp_path / "metrics.jsonl")) == 4
    assert not tracked(saved)
