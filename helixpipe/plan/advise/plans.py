"""Plans, costs and peaks that several candidates share, made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from helixpipe.plan.cost_model import Pieces, Recompute, costs_of_plan
from helixpipe.plan.cost_model.segments import segment_costs
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules import SCHEDULES, ScheduleRequest
from helixpipe.plan.simulation.costs import Costs
from helixpipe.plan.simulation.memory import peak_bytes


@lru_cache(maxsize=64)
def plan_of(schedule: str, request: ScheduleRequest) -> Plan:
    """The plan of a schedule, whatever it costs."""
    return SCHEDULES[schedule].plan(request)


def costs_of(
    pieces: Pieces, schedule: str, request: ScheduleRequest, recompute: Recompute | Sequence[Recompute]
) -> Costs:
    """What that plan costs.

    Raises:
        ValueError: as :func:`costs_of_plan`, which this equals.
    """
    segments = segment_costs(pieces, plan_of(schedule, request), recompute)
    return replace(_costs_but_segments(pieces, schedule, request), segments=segments)


@lru_cache(maxsize=128)
def _costs_but_segments(pieces: Pieces, schedule: str, request: ScheduleRequest) -> Costs:
    """All that is the same whatever is computed again."""
    return costs_of_plan(pieces, plan_of(schedule, request), Recompute.NONE)


@lru_cache(maxsize=2048)
def peak_of(
    pieces: Pieces, schedule: str, request: ScheduleRequest, recompute: Recompute | tuple[Recompute, ...]
) -> int:
    """Peak bytes of that plan on the worst rank."""
    return max(peak_bytes(plan_of(schedule, request), costs_of(pieces, schedule, request, recompute)))


def with_layers_apart(schedule: str, request: ScheduleRequest) -> ScheduleRequest:
    """The same, with a name for every layer where the schedule takes such.

    Its plan has the same orders, and holds whatever each layer computes again.
    """
    if "layer_kinds" not in SCHEDULES[schedule].options:
        return request
    return replace(request, layer_kinds=tuple(f"layer{layer}" for layer in range(request.num_layers)))
