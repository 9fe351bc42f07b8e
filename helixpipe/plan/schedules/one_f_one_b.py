"""1F1B: each rank fills the pipeline, then alternates one forward and one backward.

Narayanan et al. 2021 (PipeDream-Flush), section 2.2.1 of the Megatron-LM paper.
"""

from __future__ import annotations

from collections.abc import Sequence

from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.request import ScheduleRequest, stage_plan


def one_forward_one_backward(
    forwards: Sequence[Operation], backwards: Sequence[Operation], warmup: int
) -> list[Operation]:
    """``warmup`` forwards, then forward and backward in turn, then the remaining backwards."""
    warmup = min(warmup, len(forwards))
    order = list(forwards[:warmup])
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += (forward, backward)
    return order + list(backwards[len(forwards) - warmup :])


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only 1F1B plan."""
    micro_batches = range(request.num_microbatches)
    return stage_plan(
        "1f1b",
        request,
        (
            one_forward_one_backward(
                [Operation(rank, Kind.F, i) for i in micro_batches],
                [Operation(rank, Kind.B, i) for i in micro_batches],
                warmup=request.num_ranks - rank - 1,
            )
            for rank in range(request.num_ranks)
        ),
    )
