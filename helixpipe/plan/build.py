"""From a schedule's name and arguments to a plan that is ready to run."""

from __future__ import annotations

import difflib

from helixpipe.plan.lower import lower
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules import SCHEDULES, Schedule, ScheduleRequest
from helixpipe.plan.simulation.costs import Costs
from helixpipe.plan.validate import validate

OPTION_FLAGS = {
    "num_fold": "--num-fold",
    "virtual_stages": "--virtual-stages",
    "attention_range": "--attention-range",
    "num_slices": "--num-slices",
    "head_placement": "--head-placement",
    "round_order": "--round-order",
    "split_weight_gradients": "--split-weight-gradients",
    "costs": "--costs",
    "layer_kinds": "--layer-kinds",
    "resend_context": "--resend-context",
    "stage_layers": "--stage-layers",
    "microbatch_group": "--microbatch-group",
}


def build_plan(schedule: str, request: ScheduleRequest, *, compute_only: bool = False) -> Plan:
    """Place, order, lower and validate.

    Args:
        schedule: a key of ``SCHEDULES``.
        request: its arguments.
        compute_only: leave the messages out.

    Raises:
        ValueError: unknown schedule, an argument that the schedule does not have, or sizes that do not fit;
            the message says what to change.
    """
    entry = find_schedule(schedule)
    for option, flag in OPTION_FLAGS.items():
        if getattr(request, option) is not None and option not in entry.options:
            users = ", ".join(name for name, other in SCHEDULES.items() if option in other.options)
            raise ValueError(f"{flag} does not apply to {schedule}; remove it (it is for {users})")
    plan = entry.plan(request)
    if compute_only:
        validate(plan)
        return plan
    return complete(plan, None if request.costs is None else request.costs.of(plan))


def complete(plan: Plan, costs: Costs | None = None) -> Plan:
    """A compute-only plan with its messages, validated; :class:`PlanError` if it must not run.

    Args:
        plan: without messages.
        costs: of its operations and messages, where they are known: they say where receives are posted.
    """
    lowered = lower(plan, costs)
    validate(lowered)
    return lowered


def find_schedule(name: str) -> Schedule:
    """The registry entry of a schedule; ``ValueError`` that lists the known ones if there is none."""
    if name not in SCHEDULES:
        close = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown schedule {name!r}; {hint}known: {', '.join(SCHEDULES)}")
    return SCHEDULES[name]
