"""Operations as ranges of whatever profiler is watching: torch's own, or Nsight Systems through NVTX.

A range has the operation's text form as its name, so that every profiler shows the plan. Without a profiler
there are none, and an iteration pays for one look.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

from helixpipe.plan.operation import Operation

# Nsight Systems sets it for the processes that it watches.
_NSIGHT = "NSYS_PROFILING_SESSION_ID"


def range_maker() -> Callable[[Operation], AbstractContextManager[object]] | None:
    """Makes the range of an operation; None if nobody would see it."""
    is_on: bool = torch.autograd._profiler_enabled()
    if torch.cuda.is_available() and (is_on or _NSIGHT in os.environ):
        return _range_on_gpu
    return _range if is_on else None


def with_ranges(
    steps: Iterable[tuple[Operation, Callable[[], None]]],
) -> Iterable[tuple[Operation, Callable[[], None]]]:
    """The steps of an order, each in its range if a profiler is on, else as they are."""
    make = range_maker()
    if make is None:
        return steps
    return [(operation, _in_range(make(operation), step)) for operation, step in steps]


def _in_range(around: AbstractContextManager[object], step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with around:
            step()

    return run


def _range(operation: Operation) -> AbstractContextManager[object]:
    return record_function(str(operation))


@contextmanager
def _range_on_gpu(operation: Operation) -> Iterator[None]:
    """For torch's profiler, and an NVTX range for others."""
    text = str(operation)
    torch.cuda.nvtx.range_push(text)
    try:
        with record_function(text) if torch.autograd._profiler_enabled() else nullcontext():
            yield
    finally:
        torch.cuda.nvtx.range_pop()
