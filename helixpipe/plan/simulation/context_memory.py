"""Bytes of keys and values: what slices of a sequence hold for each other beside their activations."""

from __future__ import annotations

import numpy as np

from helixpipe.plan.computations import Numbers
from helixpipe.plan.context_lifetime import Content, Holding, holdings
from helixpipe.plan.operation import Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.costs import Costs


def context_changes(plan: Plan, costs: Costs, rank: int) -> tuple[Numbers, Numbers]:
    """Bytes that a rank takes before each of its computations, and drops after it.

    See :func:`helixpipe.plan.context_lifetime.holdings`. Gradients in a message are as large as the keys and
    values; sums of them may have a wider type.
    """
    places: dict[Operation, int] = {}
    num_computed = 0
    for op in plan.orders[rank]:
        places[op] = num_computed
        num_computed += op.kind.is_compute
    # What a message takes is there before the computation that follows it, if there is one.
    taken, dropped = np.zeros((2, num_computed + 1), dtype=np.int64)
    for holding in holdings(plan, rank):
        size = sum(_bytes(plan, costs, holding, i) for i in holding.micro_batches)
        taken[places[holding.start]] += size
        if holding.end.kind.is_compute:
            dropped[places[holding.end]] += size
        else:
            taken[places[holding.end]] -= size
    return taken[:-1], dropped[:-1]


def _bytes(plan: Plan, costs: Costs, holding: Holding, micro_batch: int) -> int:
    cost = costs.segments[plan.cost_name(holding.segment, micro_batch)]
    return cost.gradient_bytes if holding.content is Content.SUMS else cost.context_bytes
