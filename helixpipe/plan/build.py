"""From a schedule's name and arguments to a plan that is ready to run."""

from __future__ import annotations

import difflib
from functools import lru_cache

from helixpipe.plan.lower import lower
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules import SCHEDULES, ScheduleRequest
from helixpipe.plan.validate import validate

OPTION_FLAGS = {
    "num_fold": "--num-fold",
    "virtual_stages": "--virtual-stages",
    "attention_range": "--attention-range",
    "num_slices": "--num-slices",
    "head_placement": "--head-placement",
}


@lru_cache(maxsize=16)
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
    if schedule not in SCHEDULES:
        close = difflib.get_close_matches(schedule, SCHEDULES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown schedule {schedule!r}; {hint}known: {', '.join(SCHEDULES)}")
    entry = SCHEDULES[schedule]
    for option, flag in OPTION_FLAGS.items():
        if getattr(request, option) is not None and option not in entry.options:
            users = ", ".join(name for name, other in SCHEDULES.items() if option in other.options)
            raise ValueError(f"{flag} means nothing to {schedule}; leave it out (it is for {users})")
    plan = entry.plan(request)
    if not compute_only:
        plan = lower(plan)
    validate(plan)
    return plan
