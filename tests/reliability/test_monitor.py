"""Sentinels and hub around ranks that need no torch: real processes, real signals, started in a moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
RANK = ROOT / "tests" / "support" / "watched_rank.py"


class Ended(NamedTuple):
    """Exit codes by rank, and what was said, all ranks' and sentinels' lines together."""

    codes: list[int]
    lines: list[str]

    def of(self, start: str) -> str:
        """The only line that starts so."""
        (line,) = (line for line in self.lines if line.startswith(start))
        return line.removeprefix(start)


class Job:
    """Ranks with one role each; nothing of them may be left when they have ended."""

    def __init__(self, folder: Path, *roles: str) -> None:
        self._said = folder / "said"
        with self._said.open("wb") as said:
            self._ranks = [
                subprocess.Popen(
                    [sys.executable, RANK, str(rank), str(len(roles)), folder],
                    env=os.environ | {"PYTHONPATH": str(ROOT), "ROLES": ",".join(roles), "JOB": str(folder)},
                    stderr=said,
                )
                for rank in range(len(roles))
            ]
        self._mark = str(folder)

    def processes(self):
        """Ranks and sentinels that run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("JOB") == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end(self, within_s: float = 60.0) -> Ended:
        """Wait for all of it to end."""
        try:
            codes = [rank.wait(timeout=within_s) for rank in self._ranks]
            end = time.monotonic() + 20
            while left := self.processes():
                assert time.monotonic() < end, f"left behind: {[process.cmdline() for process in left]}"
                time.sleep(0.1)
        finally:
            self.kill()
        return Ended(codes, self._said.read_text().splitlines())

    def kill(self) -> None:
        """Leave nothing behind, whatever has gone wrong."""
        for process in self.processes():
            process.kill()
        for rank in self._ranks:
            rank.wait()

    def stacks(self, rank: int) -> str:
        """What a rank wrote after a hang."""
        (path,) = Path(self._mark, "stacks").glob(f"stacks_*_rank_{rank}.txt")
        return path.read_text()

    def hangs(self) -> set[str]:
        """When ranks hung, as the names of what they wrote have it."""
        return {path.name.split("_")[1] for path in Path(self._mark, "stacks").iterdir()}


JOBS = {
    "good": ("work", "work", "work"),
    "kill": ("wait 1", "kill", "wait 1"),
    "kill rank 0": ("kill", "wait 0", "wait 0"),
    "stop": ("wait 1", "wait 2", "stop"),
    "hold": ("wait 1", "wait 2", "hold"),
    "circle": ("wait 1", "wait 0"),
    "absent": ("wait 1", "absent"),
    "fail": ("wait 1", "fail"),
    "lose 0": ("lose", "wait 0"),
    "lose 1": ("wait 1", "lose"),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """All of ``JOBS``, started at once: most of their time they stand still."""
    started = {name: Job(tmp_path_factory.mktemp("job"), *roles) for name, roles in JOBS.items()}
    yield started
    for job in started.values():
        job.kill()


def test_a_job_that_ends_well_says_nothing(jobs):
    assert jobs["good"].end() == ([0, 0, 0], [])


def test_a_killed_rank(jobs):
    ended = jobs["kill"].end()
    assert ended.codes == [4, -9, 4]
    said = ended.of("job: error: ")
    assert "rank 1 (stage 1, host " in said
    # As it is now, not as it was half a second ago.
    assert said.endswith(
        "last completed: rank 0: none (step 3), rank 1: none (step 3), rank 2: none (step 3)"
    )
    for rank in (0, 2):
        line = ended.of(f"job: rank {rank}: error: ")
        assert "was lost" in line
        assert "in 2F1 (forward of segment 2, micro batch 1)" in line
        assert "this rank: step 3, waiting" in line
    assert len(ended.lines) == 3


def test_rank_0_may_be_the_one_that_is_killed(jobs):
    ended = jobs["kill rank 0"].end()
    assert ended.codes == [-9, 4, 4]
    assert "rank 0 (stage 0, host " in ended.of("job: error: ")


@pytest.mark.parametrize("fault", ["stop", "hold"])
def test_a_rank_that_hangs_is_told_from_those_that_wait(jobs, fault):
    ended = jobs[fault].end()
    assert ended.codes == [5, 5, 5 if fault == "stop" else -9]
    said = ended.of("job: error: hang: rank 2 ")
    assert ("is stopped" if fault == "stop" else "does not let Python run") in said
    assert "held up: ranks 0, 1" in said
    for rank, words in enumerate(["from rank 1 (1RECV_F1@1)", "from rank 2 (1RECV_F1@2)", "in 2F1"]):
        assert words in ended.of(f"job: rank {rank}: error: hang: stage {rank}, step 3, ")
        # Rank 2 goes on after a stop.
        where = {"stop": "in main", "hold": "in _hold_interpreter"}[fault] if rank == 2 else "in _play"
        assert where in jobs[fault].stacks(rank)
    # What belongs together has one time, that of the verdict.
    assert len(jobs[fault].hangs()) == 1


def test_ranks_that_wait_for_each_other(jobs):
    ended = jobs["circle"].end()
    assert ended.codes == [5, 5]
    said = ended.of("job: error: hang: ")
    assert "rank 0 (" in said
    assert "rank 1 (" in said
    assert "wait for each other in a circle" in said


def test_a_rank_that_never_joins(jobs):
    ended = jobs["absent"].end()
    assert ended.codes == [5, 9]
    assert ended.of("job: error: hang: ").startswith("rank 1 has not joined the job; held up: rank 0")


def test_a_rank_that_fails_by_itself(jobs):
    ended = jobs["fail"].end()
    assert ended.codes == [4, 1]
    assert ended.of("job: rank 1: error: ").startswith("ValueError: no more; step 3, ")
    assert "failed: ValueError: no more; step 3" in ended.of("job: rank 0: error: rank 1 ")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_sentinel_is_killed(jobs, rank):
    """With that of rank 0 the hub has gone, too."""
    ended = jobs[f"lose {rank}"].end()
    assert ended.codes == [4, 4]
    assert "its sentinel was killed" in ended.of(f"rank {rank}: error: ")
    assert f"rank {rank} " in ended.of(f"job: rank {1 - rank}: error: ")


@pytest.mark.slow
def test_a_job_that_is_suspended_and_goes_on_is_not_overdue(tmp_path):
    started = Job(tmp_path, "work", "work")
    time.sleep(1.5)
    processes = started.processes()
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    for process in processes:
        process.send_signal(signal.SIGCONT)
    assert started.end() == ([0, 0], [])
