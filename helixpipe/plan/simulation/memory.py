"""Liveness of activations: what each rank holds, operation by operation."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import NamedTuple

from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.context_memory import context_changes
from helixpipe.plan.simulation.costs import Costs, SegmentCost


class Held(NamedTuple):
    """Bytes on a rank while an operation runs and after it."""

    during: int
    after: int


def held_bytes(plan: Plan, costs: Costs, rank: int) -> list[Held]:
    """What ``rank`` holds at each of its compute operations, in execution order.

    What a forward keeps lives from the start of F to the end of B; where the micro batch has W,
    ``weight_bytes`` live on to the end of W. A workspace lives as long as its operation. Keys and values that
    are read elsewhere than where they are made, and gradients for earlier slices, live as
    :mod:`.context_memory` says. An evaluation plan keeps nothing. The rank's static bytes are always there.
    """
    held = costs.rank(rank).static_bytes
    levels = []
    taken, dropped = context_changes(plan, costs, rank) if plan.slices else (Counter[Operation](), Counter())
    for op in plan.orders[rank]:
        held += taken[op]
        if not op.kind.is_compute:
            held -= dropped[op]
            continue
        cost = costs.segments[plan.cost_name(op.segment, op.micro_batch)]
        kept = cost.bytes if op.kind is Kind.F else 0
        during = held + kept + cost.workspace_bytes
        held += kept - _released(op, cost, plan) - dropped[op]
        levels.append(Held(during, held))
    return levels


def peak_bytes(plan: Plan, costs: Costs) -> list[int]:
    """Peak bytes per rank."""
    return [
        max(chain.from_iterable(held_bytes(plan, costs, rank)), default=costs.rank(rank).static_bytes)
        for rank in range(plan.num_ranks)
    ]


def peak_activations(plan: Plan) -> list[int]:
    """Peak number of (segment, micro batch) pairs that each rank holds for its backward pass."""
    return peak_bytes(plan, Costs(dict.fromkeys(plan.cost_names, SegmentCost(0, 0, bytes=1)), {}))


def _released(op: Operation, cost: SegmentCost, plan: Plan) -> int:
    if op.kind is Kind.F:
        return 0 if plan.has_backward else cost.bytes
    if op.micro_batch not in plan.split_micro_batches:
        return cost.bytes
    return cost.held_for_weight if op.kind is Kind.W else cost.bytes - cost.held_for_weight
