"""Liveness of activations: what each rank holds, operation by operation."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.costs import Costs, SegmentCost


class Held(NamedTuple):
    """Bytes on a rank while an operation runs and after it."""

    during: int
    after: int


def held_bytes(plan: Plan, costs: Costs, rank: int) -> list[Held]:
    """What ``rank`` holds at each of its compute operations, in execution order.

    What a forward keeps lives from the start of F to the end of B; where the micro batch has W,
    ``weight_bytes`` live on to the end of W. A workspace lives as long as its operation. Gradients for
    earlier slices are there from the first backward of their sequence on. An evaluation plan keeps nothing.
    The rank's static bytes are always there.
    """
    held = costs.rank(rank).static_bytes
    levels = []
    earlier = {group[-1]: group[:-1] for group in plan.slices}
    awaits_gradients = {i for group in earlier.values() for i in group}
    for op in plan.orders[rank]:
        if not op.kind.is_compute:
            continue
        cost = costs.segments[plan.cost_name(op.segment, op.micro_batch)]
        kept = cost.bytes if op.kind is Kind.F else 0
        released = _released(op, cost, plan)
        if op.kind is Kind.B:
            names = (plan.cost_name(op.segment, i) for i in earlier.get(op.micro_batch, ()))
            kept = sum(costs.segments[name].gradient_bytes for name in names)
            released += cost.gradient_bytes if op.micro_batch in awaits_gradients else 0
        during = held + kept + cost.workspace_bytes
        held += kept - released
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
