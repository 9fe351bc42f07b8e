"""Interleaved 1F1B: each rank holds several virtual stages (Narayanan et al. 2021, section 2.2.2)."""

from __future__ import annotations

from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.one_f_one_b import one_forward_one_backward
from helixpipe.plan.schedules.request import ScheduleRequest, require_multiple, stage_plan


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only interleaved plan; micro batches go through the chunks in groups, of p by default."""
    p, v, m = request.num_ranks, request.virtual_stages or 2, request.num_microbatches
    group = _group_size(request)
    # A rank's sequence of forwards.
    groups = [range(first, min(first + group, m)) for first in range(0, m, group)]
    table = [(chunk, i) for own in groups for chunk in range(v) for i in own]

    def order(rank: int) -> list[Operation]:
        return one_forward_one_backward(
            [Operation(chunk * p + rank, Kind.F, i) for chunk, i in table],
            [Operation((v - 1 - chunk) * p + rank, Kind.B, i) for chunk, i in table],
            warmup=(p - rank - 1) * 2 + (v - 1) * group,
        )

    return stage_plan(
        "interleaved",
        request,
        (order(rank) for rank in range(p)),
        stage_ranks=tuple(range(p)) * v,
        parameters=({"virtual_stages": v} if v > 1 else {})
        | ({"microbatch_group": group} if group != p else {}),
    )


def _group_size(request: ScheduleRequest) -> int:
    """Micro batches that go through a chunk before the next chunk's turn, as Megatron allows them.

    Fewer than p at a time would wait for each other.
    """
    p, m, group = request.num_ranks, request.num_microbatches, request.microbatch_group
    if group is None:
        require_multiple(m, p, "the number of micro batches", "the pipeline-parallel size")
        return p
    rest = m % group
    if not p <= group <= m or 0 < rest < p:
        raise ValueError(
            f"groups of {group} micro batches, and what {m} leave behind them, must have from {p} (the "
            f"pipeline-parallel size) to {m} each; use groups of {m}, or leave the size out"
        )
    return group
