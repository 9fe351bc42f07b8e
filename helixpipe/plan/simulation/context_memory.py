"""Bytes of keys and values: what slices of a sequence hold for each other beside their activations."""

from __future__ import annotations

from collections import Counter

from helixpipe.plan.context_lifetime import Content, Holding, holdings
from helixpipe.plan.operation import Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.costs import Costs

_Changes = tuple[Counter[Operation], Counter[Operation]]


def context_changes(plan: Plan, costs: Costs, rank: int) -> _Changes:
    """Bytes that a rank takes as each operation starts, and drops as it ends.

    See :func:`helixpipe.plan.context_lifetime.holdings`. Gradients in a message are as large as the keys and
    values; sums of them may have a wider type.
    """
    taken: Counter[Operation] = Counter()
    dropped: Counter[Operation] = Counter()
    for holding in holdings(plan, rank):
        size = sum(_bytes(plan, costs, holding, i) for i in holding.micro_batches)
        taken[holding.start] += size
        dropped[holding.end] += size
    return taken, dropped


def _bytes(plan: Plan, costs: Costs, holding: Holding, micro_batch: int) -> int:
    cost = costs.segments[plan.cost_name(holding.segment, micro_batch)]
    return cost.gradient_bytes if holding.content is Content.SUMS else cost.context_bytes
