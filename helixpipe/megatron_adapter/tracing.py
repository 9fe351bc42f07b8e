"""Trace Megatron's own schedules through the timers they already call."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.reliability.record import NoProgress, Progress
from helixpipe.runtime.profiler_ranges import range_maker
from helixpipe.runtime.trace import Trace

_COMPUTE_TIMERS = {"forward-compute": Kind.F, "backward-compute": Kind.B}


class TracingTimers:
    """Stands in for ``config.timers``: turns Megatron's compute timers into a trace of plan operations.

    Megatron's functions do not say which micro batch they run, only that they run one; the plan of the
    same schedule says which it must be, and the kind is checked.

    Args:
        plan: the plan of the schedule that Megatron runs, for training or for evaluation.
        rank: this pipeline rank.
        trace: where to record.
        progress: told of operations. What Megatron waits for between them it does not say.
    """

    def __init__(self, plan: Plan, rank: int, trace: Trace, progress: Progress | None = None) -> None:
        self.trace = trace
        self.progress = progress or NoProgress()
        self._order = [op for op in plan.orders[rank] if op.kind.is_compute]
        self._next = 0
        self._make_range = range_maker()
        self.range = ExitStack()

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        """The timer of a name, as Megatron's ``Timers`` would give."""
        if name == "forward-backward":
            return _IterationTimer(self)
        kind = _COMPUTE_TIMERS.get(name)
        return _IGNORED if kind is None else _ComputeTimer(self, kind)

    def begin(self) -> None:
        """A new iteration starts."""
        self._next = 0
        self._make_range = range_maker()
        self.trace.start()

    def open_range(self, operation: Operation) -> None:
        """Show the operation to a profiler until ``range`` is closed."""
        if self._make_range is not None:
            self.range.enter_context(self._make_range(operation))

    def next_operation(self, kind: Kind) -> Operation:
        """The operation that runs now."""
        operation = self._order[self._next]
        assert operation.kind is kind, f"Megatron runs {kind.value}, the plan says {operation}"
        self._next += 1
        return operation


class _IterationTimer:
    def __init__(self, timers: TracingTimers) -> None:
        self.timers = timers

    def start(self, barrier: bool = False) -> None:
        self.timers.begin()

    def stop(self, barrier: bool = False) -> None:
        self.timers.trace.stop()


class _ComputeTimer:
    """Megatron starts and stops a timer by asking for it twice, so the open one is kept by the trace."""

    def __init__(self, timers: TracingTimers, kind: Kind) -> None:
        self.timers = timers
        self.kind = kind

    def start(self, barrier: bool = False) -> None:
        operation = self.timers.next_operation(self.kind)
        self.timers.open_range(operation)
        self.timers.progress.begin(operation)
        self.timers.trace.begin(operation)

    def stop(self, barrier: bool = False) -> None:
        self.timers.trace.end()
        self.timers.progress.end()
        self.timers.range.close()


class _Ignored:
    def start(self, barrier: bool = False) -> None:
        pass

    def stop(self, barrier: bool = False) -> None:
        pass


_IGNORED = _Ignored()
