"""Liveness of activations: what each rank holds, operation by operation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from helixpipe.plan.computations import Numbers
from helixpipe.plan.operation import Kind
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
    during, after = _levels(plan, costs, _bytes_of_classes(plan, costs), rank)
    return list(map(Held, during.tolist(), after.tolist()))


def peak_bytes(plan: Plan, costs: Costs) -> list[int]:
    """Peak bytes per rank."""
    of_classes = _bytes_of_classes(plan, costs)
    peaks = []
    for rank in range(plan.num_ranks):
        during, after = _levels(plan, costs, of_classes, rank)
        static_bytes = costs.rank(rank).static_bytes
        peaks.append(max(int(during.max()), int(after.max())) if len(during) else static_bytes)
    return peaks


def peak_activations(plan: Plan) -> list[int]:
    """Peak number of (segment, micro batch) pairs that each rank holds for its backward pass."""
    return peak_bytes(plan, Costs(dict.fromkeys(plan.cost_names, SegmentCost(0, 0, bytes=1)), {}))


class _ClassBytes(NamedTuple):
    """Bytes of each class of computations: kept from its start, needed while it runs, kept no longer."""

    kept: Numbers
    workspace: Numbers
    released: Numbers


def _bytes_of_classes(plan: Plan, costs: Costs) -> _ClassBytes:
    rows = []
    for kind, name, splits_backward in plan.computations.classes:
        cost = costs.segments[name]
        held_for_weight = cost.held_for_weight if splits_backward else 0
        released = {Kind.F: 0 if plan.has_backward else cost.bytes, Kind.W: held_for_weight}
        kept = cost.bytes if kind is Kind.F else 0
        rows.append((kept, cost.workspace_bytes, released.get(kind, cost.bytes - held_for_weight)))
    return _ClassBytes(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)


def _levels(plan: Plan, costs: Costs, of_classes: _ClassBytes, rank: int) -> tuple[Numbers, Numbers]:
    """Bytes held during and after each computation of a rank."""
    work = plan.computations
    classes = work.class_of[work.begins[rank] : work.begins[rank + 1]]
    kept, released = of_classes.kept[classes], of_classes.released[classes]
    if plan.slices:
        taken, dropped = context_changes(plan, costs, rank)
        kept, released = kept + taken, released + dropped
    before = costs.rank(rank).static_bytes + np.cumsum(kept - released) - (kept - released)
    return before + kept + of_classes.workspace[classes], before + kept - released
