"""One face for every executable schedule: a ``forward_backward_func`` that knows its plan and trace."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from helixpipe.megatron_adapter.elastic_forward_backward import ElasticForwardBackward
from helixpipe.megatron_adapter.forward_backward import (
    HelixForwardBackward,
    PlannedForwardBackward,
    StageForwardBackward,
)
from helixpipe.megatron_adapter.tracing import TracingTimers
from helixpipe.plan import Plan, ScheduleRequest, build_plan
from helixpipe.plan.schedules import V_SHAPED
from helixpipe.reliability.record import NoProgress, Progress
from helixpipe.runtime.out_of_memory import naming_operation
from helixpipe.runtime.trace import Clock, Trace

# By Megatron's own functions; the others are executed from their plans.
MEGATRON_SCHEDULES = ("1f1b", "interleaved")
# Both ends of the model are on rank 0, which has two stages, like every rank.
# By a plan for each batch.
ELASTIC = "elastic"
EXECUTABLE = (*MEGATRON_SCHEDULES, "gpipe", "zb-h1", *V_SHAPED, "helix")


class MegatronForwardBackward:
    """Megatron's own schedule function, traced through its timers and otherwise untouched.

    Args:
        plan: the plan of the same schedule: says which micro batch each traced operation is.
        clock: times the trace.
        progress: told of every operation as it begins and ends.
    """

    def __init__(self, plan: Plan, clock: Clock, progress: Progress | None = None) -> None:
        self.plan = plan
        self._progress = progress or NoProgress()
        # Megatron's timers also run while sends are waited for, and not around every receive.
        self.trace = Trace(clock, sees_waits=False)
        self._plans = {False: plan, True: plan.forward_only()}

    def __call__(self, *, forward_only: bool = False, **arguments: Any) -> list[Any]:
        """Run one iteration; Megatron's arguments and return value."""
        self.plan = self._plans[forward_only]
        rank = parallel_state.get_pipeline_model_parallel_rank()
        config = get_model_config(arguments["model"][0])
        config.timers = TracingTimers(self.plan, rank, self.trace, self._progress)
        try:
            with naming_operation(self.plan, rank, self.trace):
                return _original_function()(forward_only=forward_only, **arguments)
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


def make_schedule(
    name: str, request: ScheduleRequest, clock: Clock, progress: Progress | None = None
) -> MegatronForwardBackward | PlannedForwardBackward | ElasticForwardBackward:
    """The ``forward_backward_func`` of a schedule.

    Args:
        name: one of ``EXECUTABLE``, or ``elastic``.
        request: its sizes and options.
        clock: times the trace.
        progress: told of every operation as it begins.

    Raises:
        ValueError: a schedule that is unknown or can only be planned, or sizes that do not fit it.
    """
    if name == ELASTIC:
        return ElasticForwardBackward(clock=clock, progress=progress)
    plan = build_plan(name, request)
    if name not in EXECUTABLE:
        known = ", ".join((*EXECUTABLE, ELASTIC))
        raise ValueError(f"{name} can be planned but not executed; choose one of {known}")
    if name == "helix":
        return HelixForwardBackward(
            num_fold=int(plan.parameters["num_fold"]),
            attention_range=str(plan.parameters["attention_range"]),
            head_placement=str(plan.parameters.get("head_placement", "first")),
            clock=clock,
            progress=progress,
        )
    if name in MEGATRON_SCHEDULES:
        return MegatronForwardBackward(plan, clock, progress)
    chunks = plan.num_segments // plan.num_ranks
    return StageForwardBackward(name, chunks_per_rank=chunks, clock=clock, progress=progress)


def owned_segments(plan: Plan, rank: int) -> list[int]:
    """The segments whose weights are on ``rank``: stages, or the even segments of helix.

    A spread head belongs to the rank of its first slot.
    """
    step = 2 if plan.schedule == "helix" else 1
    return [segment for segment in range(0, plan.num_segments, step) if plan.rank_of(segment, 0) == rank]


def loss_rank(name: str) -> int:
    """The pipeline rank on which a schedule computes the loss."""
    return 0 if name in ("helix", *V_SHAPED) else parallel_state.get_pipeline_model_parallel_world_size() - 1


def needs_data(name: str, head_placement: str | None = None) -> bool:
    """True if this rank's share of a schedule reads the data set (tokens or labels)."""
    if head_placement == "spread":
        return True
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return rank in (0, loss_rank(name))


def chunk_iterators(data: Iterator[Any] | None, model: list[torch.nn.Module]) -> Any:
    """The data iterator in the form that Megatron's schedules take.

    With several model chunks each has an iterator of its own, and one that is neither first nor last gets
    None: reading from the common one would take micro batches away from the chunk that needs them.
    """
    if len(model) == 1:
        return data
    ends = [
        index
        for index, chunk in enumerate(model)
        if any(get_attr_wrapped_model(chunk, name) for name in ("pre_process", "post_process"))
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
