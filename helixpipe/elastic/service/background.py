"""Planning the next batch while the present one trains.

The planner is a program of its own, neither forked, which a process with threads must not do, nor spawned by
multiprocessing, which would load the trainer's main module, and torch with it, into the planner.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue

from helixpipe.elastic.elastic_plan import ElasticPlan
from helixpipe.elastic.job import ElasticJob, check_lengths
from helixpipe.elastic.search.planner import SLICE_COUNTS
from helixpipe.elastic.search.quick_plan import num_slices_of, plan_quickly
from helixpipe.elastic.service.planner_process import Answer, Request

# Below the shortest deadline of a training step, see helixpipe.reliability.deadlines.
PATIENCE_S = 3.0
# The first plan has to wait for the program to be loaded, and no recipe stands in for it yet.
_FIRST_PATIENCE_S = 60.0

_PACKAGES = Path(__file__).parents[2]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedBatch:
    """A plan, and what it cost to have it.

    Attributes:
        plan: of the batch.
        planning_s: seconds that planning took, wherever it ran.
        waited_s: seconds of them that training waited: what was not hidden.
        fallback: why the plan is a quick one instead of the best found; empty if it is not.
    """

    plan: ElasticPlan
    planning_s: float
    waited_s: float
    fallback: str = ""


class BackgroundPlanner:
    """Plans one batch at a time in another process.

    A plan that is late, that failed, or whose process has died is replaced by a quick one, with the number of
    slices of the last good one, and a warning; the process is then replaced, too. Never is a batch skipped,
    and never is a process waited for without end.

    Args:
        job: what is planned for.
        slice_counts: numbers of slices to try.
        patience_s: seconds that training waits for a plan that is not ready when it is needed.
    """

    def __init__(
        self, job: ElasticJob, *, slice_counts: Sequence[int] = SLICE_COUNTS, patience_s: float = PATIENCE_S
    ) -> None:
        if patience_s < 0:
            raise ValueError(f"the patience must be 0 seconds or more, not {patience_s:g}")
        self.job = job
        self.slice_counts = tuple(slice_counts)
        self.patience_s = patience_s
        self._num_slices = 1
        self._next_patience_s = max(_FIRST_PATIENCE_S, patience_s)
        self._pending: tuple[int, ...] | None = None
        self._process = _start()

    def __enter__(self) -> BackgroundPlanner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, lengths: Sequence[int]) -> None:
        """Begin to plan a batch of ``lengths``; the plan before must have been asked for.

        Raises:
            ValueError: lengths that are none.
        """
        assert self._pending is None, "the plan before has not been asked for"
        self._pending = check_lengths(lengths)
        if self._process is None:
            self._process = _start()
        if self._process is not None:
            self._process.ask(Request(self._pending, self.job, self.slice_counts))

    def result(self) -> PlannedBatch:
        """The plan of the batch that was submitted last.

        Raises:
            ValueError: no plan fits, not even a quick one.
        """
        assert self._pending is not None, "no batch was submitted"
        lengths, self._pending = self._pending, None
        started = time.perf_counter()
        found = self._answer()
        if isinstance(found, Answer) and found.plan is not None:
            self._num_slices = num_slices_of(found.plan.recipe)
            return PlannedBatch(found.plan, found.seconds, time.perf_counter() - started)
        if isinstance(found, Answer):
            reason = found.error
        else:
            reason = found
            self.close()
            self._process = _start()
        return self._quick(lengths, reason, started)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def _answer(self) -> Answer | str:
        patience_s, self._next_patience_s = self._next_patience_s, self.patience_s
        if self._process is None:
            return "the planning process cannot be started"
        return self._process.answer(patience_s)

    def _quick(self, lengths: tuple[int, ...], reason: str, started: float) -> PlannedBatch:
        began = time.perf_counter()
        try:
            plan = plan_quickly(lengths, self.job, self._num_slices)
        except ValueError as error:
            raise ValueError(f"{error} (the best plan was not found: {reason})") from None
        ended = time.perf_counter()
        _logger.warning(
            "elastic planning: %s; this batch runs a quick plan of %d slices instead of the best",
            reason,
            num_slices_of(plan.recipe),
        )
        return PlannedBatch(plan, ended - began, ended - started, reason)


def _start() -> _Process | None:
    """A process, or None where the system has no room for another: plans are quick ones then."""
    try:
        return _Process()
    except OSError as error:
        _logger.warning("elastic planning: the planning process cannot be started (%s)", error.strerror)
        return None


class _Process:
    """One planning process, and a thread that talks to it: a stopped process must not stop the trainer."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._popen = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "helixpipe.elastic.service.planner_process",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        self._answers: SimpleQueue[Answer | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, request: Request) -> None:
        """Send a request; the one before must have been answered."""
        arguments = (self._connection, request, self._answers)
        self._thread = threading.Thread(target=_exchange, args=arguments, daemon=True)
        self._thread.start()

    def answer(self, patience_s: float) -> Answer | str:
        """The answer to the request, or why there is none."""
        try:
            found = self._answers.get(timeout=patience_s)
        except Empty:
            return f"no plan within {patience_s:g} seconds"
        if found is not None:
            return found
        # The socket was closed from the other end, so the process is ending; but one that hangs must not.
        try:
            code = self._popen.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "the planning process has closed its connection"
        return f"the planning process died (exit code {code})"

    def kill(self) -> None:
        """End the process at once; it has nothing to lose."""
        self._popen.kill()
        self._popen.wait()
        if self._thread is not None:
            self._thread.join()  # the other end of its socket is closed now
        self._connection.close()


def _exchange(connection: Connection, request: Request, answers: SimpleQueue[Answer | None]) -> None:
    try:
        connection.send(request)
        answers.put(connection.recv())
    except (EOFError, OSError):
        answers.put(None)
    except Exception as error:  # what cannot be unpickled must not be waited for
        answers.put(Answer(None, f"{type(error).__name__}: {error}", 0.0))


def _environment() -> dict[str, str]:
    """The trainer's, with this package where the planner finds it, and one thread for arithmetic."""
    path = os.pathsep.join(filter(None, (str(_PACKAGES), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
