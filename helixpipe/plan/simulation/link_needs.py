"""What a plan needs of each link: how many bytes, and how long the compute is that hides them."""

from __future__ import annotations

from typing import NamedTuple

from helixpipe.plan.operation import Kind, Operation, output_edge
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.costs import Costs

Pair = tuple[int, int]


class LinkNeed(NamedTuple):
    """The message of a link that leaves the least time per byte.

    Attributes:
        num_bytes: of the message, on all GPUs of a pipeline rank together.
        compute_ms: of the operation that makes it. While a message is under way its sender computes the next
            one: a message that takes longer makes the link, and not the compute, set the pace.
    """

    num_bytes: int
    compute_ms: float


def link_needs(plan: Plan, costs: Costs) -> dict[Pair, LinkNeed]:
    """The need of every ordered pair of ranks that has activations or gradients to send.

    Args:
        plan: of any schedule, lowered or not.
        costs: of the plan; empty is returned if they do not know the size of messages.
    """
    needs: dict[Pair, LinkNeed] = {}
    if costs.message_bytes is None:
        return needs
    for rank, order in enumerate(plan.orders):
        for op in order:
            edge = output_edge(op, plan.num_segments) if op.kind.is_compute else None
            if edge is None or (peer := plan.rank_of(edge[1], op.micro_batch)) == rank:
                continue
            need = _need(plan, costs, op, edge)
            known = needs.get((rank, peer))
            if known is None or need.num_bytes * known.compute_ms > known.num_bytes * need.compute_ms:
                needs[rank, peer] = need
    return needs


def _need(plan: Plan, costs: Costs, op: Operation, edge: tuple[int, int]) -> LinkNeed:
    first, second = (plan.cost_name(segment, op.micro_batch) for segment in sorted(edge))
    splits = op.kind is Kind.B and op.micro_batch in plan.split_micro_batches
    name = plan.cost_name(op.segment, op.micro_batch)
    compute_ms = costs.duration_ms(op.kind, name, splits_backward=splits)
    return LinkNeed(costs.num_bytes(first, second), compute_ms)
