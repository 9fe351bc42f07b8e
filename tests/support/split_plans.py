"""Plans with weight-gradient operations, ordered by hand: what the executor must run whoever made it."""

from __future__ import annotations

from collections.abc import Collection

from helixpipe.plan import Kind, Operation, Plan, ScheduleRequest, build_plan
from helixpipe.plan.lower import lower
from helixpipe.plan.validate import validate


def with_weight_gradients(plan: Plan, delay: int, only: Collection[int] | None = None) -> Plan:
    """``plan`` with each W ``delay`` backwards with W after its own B, or at the end of its rank's order.

    W is given to the micro batches ``only``, to all if None; B of the others is the whole backward pass.
    """
    plan = plan.compute_only()
    split_off = range(plan.num_microbatches) if only is None else only
    split = plan.with_orders(_delayed(order, delay, split_off) for order in plan.orders)
    lowered = lower(split)
    validate(lowered)
    return lowered


def split_1f1b(num_ranks: int, num_microbatches: int, delay: int) -> Plan:
    """1F1B whose weight gradients wait, as in ZB-H1."""
    request = ScheduleRequest(num_layers=num_ranks, num_ranks=num_ranks, num_microbatches=num_microbatches)
    return with_weight_gradients(build_plan("1f1b", request), delay)


def _delayed(order: tuple[Operation, ...], delay: int, split_off: Collection[int]) -> list[Operation]:
    result: list[Operation] = []
    waiting: list[Operation] = []
    for operation in order:
        result.append(operation)
        if operation.kind is Kind.B and operation.micro_batch in split_off:
            waiting.append(operation._replace(kind=Kind.W))
            if len(waiting) > delay:
                result.append(waiting.pop(0))
    return result + waiting
