"""What is wrong with a plan, and where."""

from __future__ import annotations

from collections.abc import Iterator

from helixpipe.plan.operation import Operation
from helixpipe.plan.plan import Plan

# How many operations of a rank an error shows on either side of the culprit.
_AROUND = 4


class PlanError(ValueError):
    """A plan that must not run. The message shows the place, marked ``<-- here``."""


def operations(plan: Plan) -> Iterator[tuple[int, int, Operation]]:
    """Every operation of a plan with its rank and its index in that rank's order."""
    for rank, order in enumerate(plan.orders):
        for index, op in enumerate(order):
            yield rank, index, op


def grid(plan: Plan, rank: int, index: int) -> str:
    """The neighbourhood of one operation, marked."""
    order = plan.orders[rank]
    first, last = max(0, index - _AROUND), min(len(order), index + _AROUND + 1)
    before = " ".join(["..."] * (first > 0) + [str(op) for op in order[first : index + 1]])
    after = " ".join([str(op) for op in order[index + 1 : last]] + ["..."] * (last < len(order)))
    return f"  rank {rank}: {before} <-- here {after}".rstrip()
