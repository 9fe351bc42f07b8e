"""Interleaved 1F1B: each rank holds several virtual stages (Narayanan et al. 2021, section 2.2.2)."""

from __future__ import annotations

from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.one_f_one_b import one_forward_one_backward
from helixpipe.plan.schedules.request import ScheduleRequest, require_multiple, stage_plan


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only interleaved plan; micro batches go through the chunks in groups of p."""
    p, v, m = request.num_ranks, request.virtual_stages or 2, request.num_microbatches
    require_multiple(m, p, "the number of micro batches", "the pipeline-parallel size")
    # Position k of a rank's sequence of forwards: which chunk, which micro batch.
    chunks = [k % (p * v) // p for k in range(m * v)]
    micro_batches = [k // (p * v) * p + k % p for k in range(m * v)]

    def order(rank: int) -> list[Operation]:
        return one_forward_one_backward(
            [Operation(chunk * p + rank, Kind.F, i) for chunk, i in zip(chunks, micro_batches, strict=True)],
            [
                Operation((v - 1 - chunk) * p + rank, Kind.B, i)
                for chunk, i in zip(chunks, micro_batches, strict=True)
            ],
            warmup=(p - rank - 1) * 2 + (v - 1) * p,
        )

    return stage_plan(
        "interleaved",
        request,
        (order(rank) for rank in range(p)),
        stage_ranks=tuple(range(p)) * v,
        parameters={"virtual_stages": v} if v > 1 else None,
    )
