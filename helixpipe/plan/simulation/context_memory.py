"""Bytes of keys and values: what slices of a sequence hold for each other beside their activations."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from helixpipe.plan.computations import Computations, Numbers
from helixpipe.plan.context_lifetime import Content, holdings
from helixpipe.plan.operation import Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.costs import Costs


class _Changes(NamedTuple):
    """What a rank takes and drops, whatever it costs.

    Attributes:
        sizes: by which bytes differ: cost name, and whether they are sums of gradients.
        taken, dropped: rows of a computation's place on the rank, a size's place, and how many of it.
    """

    sizes: tuple[tuple[str, bool], ...]
    taken: Numbers
    dropped: Numbers


# Plans are looked at with many costs. A plan's computations stand for it.
_known: WeakKeyDictionary[Computations, dict[int, _Changes]] = WeakKeyDictionary()


def context_changes(plan: Plan, costs: Costs, rank: int) -> tuple[Numbers, Numbers]:
    """Bytes that a rank takes before each of its computations, and drops after it.

    See :func:`helixpipe.plan.context_lifetime.holdings`. Gradients in a message are as large as the keys and
    values; sums of them may have a wider type.
    """
    of_ranks = _known.setdefault(plan.computations, {})
    if rank not in of_ranks:
        of_ranks[rank] = _changes(plan, rank)
    changes = of_ranks[rank]
    segments = (costs.segments[name] for name, _ in changes.sizes)
    sizes = np.array(
        [
            cost.gradient_bytes if is_sum else cost.context_bytes
            for cost, (_, is_sum) in zip(segments, changes.sizes, strict=True)
        ],
        dtype=np.int64,
    )
    begin, end = plan.computations.begins[rank : rank + 2]
    # What a message takes is there before the computation that follows it, if there is one.
    totals = np.zeros((2, end - begin + 1), dtype=np.int64)
    for total, rows in zip(totals, (changes.taken, changes.dropped), strict=True):
        np.add.at(total, rows[:, 0], sizes[rows[:, 1]] * rows[:, 2])
    return totals[0, :-1], totals[1, :-1]


def _changes(plan: Plan, rank: int) -> _Changes:
    places: dict[Operation, int] = {}
    num_computed = 0
    for op in plan.orders[rank]:
        places[op] = num_computed
        num_computed += op.kind.is_compute
    sizes: dict[tuple[str, bool], int] = {}
    taken: list[tuple[int, int, int]] = []
    dropped: list[tuple[int, int, int]] = []
    for holding in holdings(plan, rank):
        for i in holding.micro_batches:
            size = plan.cost_name(holding.segment, i), holding.content is Content.SUMS
            of_size = sizes.setdefault(size, len(sizes))
            taken.append((places[holding.start], of_size, 1))
            if holding.end.kind.is_compute:
                dropped.append((places[holding.end], of_size, 1))
            else:
                taken.append((places[holding.end], of_size, -1))
    rows = (np.array(found, dtype=np.int64).reshape(-1, 3) for found in (taken, dropped))
    return _Changes(tuple(sizes), *rows)
