"""Plans whose receives are posted elsewhere than where lowering places them."""

from __future__ import annotations

from collections.abc import Iterator

from helixpipe.plan import Operation, Plan


def posted_ahead(plan: Plan, ahead: int) -> Plan:
    """Each receive posted by the time that only ``ahead`` computations stand before it, as once it was."""
    orders = []
    for order in plan.orders:
        rest: list[Operation] = []
        left = [op for op in order if op.kind.is_receive]
        computes = [index for index, op in enumerate(order) if op.kind.is_compute]
        for index, op in enumerate(order):
            reached = sum(position < index for position in computes) + ahead
            last = computes[reached] if reached < len(computes) else len(order)
            while left and order.index(left[0]) <= last:
                rest.append(left.pop(0))
            if not op.kind.is_receive:
                rest.append(op)
        orders.append(rest)
    return plan.with_orders(orders)


def moved(plan: Plan, rank: int, index: int, step: int) -> Plan:
    """An operation changes places with its neighbour."""
    order = list(plan.orders[rank])
    order[index], order[index + step] = order[index + step], order[index]
    return plan.with_orders([order if r == rank else other for r, other in enumerate(plan.orders)])


def one_place_off(plan: Plan) -> Iterator[Plan]:
    """Every plan in which one receive stands one place earlier or later."""
    for rank, order in enumerate(plan.orders):
        for index, op in enumerate(order):
            if op.kind.is_receive:
                for step in (-1, 1):
                    if 0 <= index + step < len(order):
                        yield moved(plan, rank, index, step)
