"""One face for every executable schedule: a ``forward_backward_func`` that knows its plan and trace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from helixpipe.megatron_adapter.elastic_forward_backward import ElasticForwardBackward
from helixpipe.megatron_adapter.forward_backward import (
    SegmentForwardBackward,
    SlicedSegmentForwardBackward,
    SliceForwardBackward,
    StageForwardBackward,
)
from helixpipe.megatron_adapter.tracing import TracingTimers
from helixpipe.plan import Plan
from helixpipe.plan.execution import Execution
from helixpipe.reliability.record import NoProgress, Progress
from helixpipe.runtime.out_of_memory import naming_operation
from helixpipe.runtime.trace import Clock, Trace


class ForwardBackward(Protocol):
    """Megatron's ``forward_backward_func``, which knows its plan and tells what it ran.

    Attributes:
        trace: what the last iteration ran on this rank.
        plan: of the last iteration; before the first that of every iteration, or None if there is none yet.
    """

    @property
    def trace(self) -> Trace:
        """See above."""

    @property
    def plan(self) -> Plan | None:
        """See above."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Run one iteration; Megatron's arguments and return value."""


class MegatronForwardBackward:
    """Megatron's own schedule function, traced through its timers and otherwise untouched.

    Args:
        plan: the plan of the same schedule: says which micro batch each traced operation is.
        clock: times the trace.
        progress: told of every operation as it begins and ends.
    """

    def __init__(self, plan: Plan, *, clock: Clock, progress: Progress | None = None) -> None:
        self.plan: Plan | None = plan
        self._progress = progress or NoProgress()
        # Megatron's timers also run while sends are waited for, and not around every receive.
        self.trace = Trace(clock, sees_waits=False)
        self._plans = {False: plan, True: plan.forward_only()}

    def __call__(self, *, forward_only: bool = False, **arguments: Any) -> list[Any]:
        """Run one iteration; Megatron's arguments and return value."""
        plan = self.plan = self._plans[forward_only]
        rank = parallel_state.get_pipeline_model_parallel_rank()
        config = get_model_config(arguments["model"][0])
        config.timers = TracingTimers(plan, rank, self.trace, self._progress)
        try:
            with naming_operation(plan, rank, self.trace):
                losses: list[Any] = _original_function()(forward_only=forward_only, **arguments)
                return losses
        finally:
            config.timers = None


def _original_function() -> Any:
    """What Megatron would choose; not what may have been installed in its place."""
    virtual_size = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return schedules.forward_backward_no_pipelining
    if virtual_size is None:
        return schedules.forward_backward_pipelining_without_interleaving
    return schedules.forward_backward_pipelining_with_interleaving


_FROM_PLAN: Mapping[Execution, Callable[..., ForwardBackward]] = {
    Execution.MEGATRON: MegatronForwardBackward,
    Execution.STAGES: StageForwardBackward,
    Execution.SEGMENTS: SegmentForwardBackward,
    Execution.SLICES: SliceForwardBackward,
    Execution.SLICED_SEGMENTS: SlicedSegmentForwardBackward,
}


def make_forward_backward(
    execution: Execution, plan: Plan | None, clock: Clock, progress: Progress | None = None
) -> ForwardBackward:
    """The ``forward_backward_func`` that carries out a plan.

    Args:
        execution: how, see :func:`helixpipe.plan.fit.check_executable`.
        plan: of every iteration; None where each batch has its own.
        clock: times the trace.
        progress: told of every operation as it begins.
    """
    if plan is None:
        assert execution.plans_batches
        return ElasticForwardBackward(clock=clock, progress=progress)
    return _FROM_PLAN[execution](plan, clock=clock, progress=progress)


def chunk_iterators(
    data: Iterator[Any] | None, model: list[torch.nn.Module], *, for_all: bool = False
) -> Any:
    """The data iterator in the form that Megatron's schedules take.

    With several model chunks each has an iterator of its own, and one that is neither first nor last gets
    None: reading from the common one would take micro batches away from the chunk that needs them. If
    attention needs to know of documents, all read.
    """
    if len(model) == 1:
        return data
    ends = [
        index
        for index, chunk in enumerate(model)
        if for_all or any(get_attr_wrapped_model(chunk, name) for name in ("pre_process", "post_process"))
    ]
    iterators: list[Iterator[Any] | None] = [None] * len(model)
    if data is not None:
        # A micro batch is kept from the first stage's turn to the last one's where both are here.
        for index, iterator in zip(ends, itertools.tee(data, len(ends)), strict=True):
            iterators[index] = iterator
    return iterators


def device() -> torch.device:
    """The device on which this process computes."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
