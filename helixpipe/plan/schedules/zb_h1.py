"""ZB-H1: 1F1B whose weight gradients wait and fill the end of the pipeline.

Qi et al. 2023, Zero Bubble Pipeline Parallelism (arXiv 2401.10241). B hands its result on before the weight
gradient of the same micro batch is computed, so backwards start earlier on every rank than in 1F1B.
"""

from __future__ import annotations

from collections.abc import Iterator

from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.one_f_one_b import one_forward_one_backward
from helixpipe.plan.schedules.request import ScheduleRequest, stage_plan


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only ZB-H1 plan; every rank holds at most p micro batches, as rank 0 does in 1F1B."""
    ranks = range(request.num_ranks)
    return stage_plan("zb-h1", request, (_order(rank, request) for rank in ranks))


def _order(rank: int, request: ScheduleRequest) -> Iterator[Operation]:
    """1F1B with the weight gradient of micro batch i after the backward of i + rank.

    Rank 0 holds p micro batches in its warm-up alone. Rank r holds r fewer there, so it can put off r
    weight gradients; they are what it computes while the last backwards travel to rank 0.
    """
    p, m = request.num_ranks, request.num_microbatches
    pairs = one_forward_one_backward(
        [Operation(rank, Kind.F, i) for i in range(m)],
        [Operation(rank, Kind.B, i) for i in range(m)],
        warmup=p - rank - 1,
    )
    for operation in pairs:
        yield operation
        if operation.kind is Kind.B and operation.micro_batch >= rank:
            yield Operation(rank, Kind.W, operation.micro_batch - rank)
    yield from (Operation(rank, Kind.W, i) for i in range(max(0, m - rank), m))
