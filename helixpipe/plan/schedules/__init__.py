"""Schedules: one short file each, which places segments on ranks and orders their F, B and W.

A schedule is a function from a :class:`ScheduleRequest` to a compute-only plan. Messages, buffers and
checks come from the passes that all schedules share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules import gpipe, helix, interleaved, one_f_one_b
from helixpipe.plan.schedules.request import ScheduleRequest


class Schedule(NamedTuple):
    """A registered schedule: its planner and the optional arguments that mean something to it."""

    plan: Callable[[ScheduleRequest], Plan]
    options: frozenset[str] = frozenset()


SCHEDULES: Mapping[str, Schedule] = {
    "gpipe": Schedule(gpipe.plan),
    "1f1b": Schedule(one_f_one_b.plan),
    "interleaved": Schedule(interleaved.plan, frozenset({"virtual_stages"})),
    "helix": Schedule(helix.plan, frozenset({"num_fold", "attention_range"})),
}

__all__ = ["SCHEDULES", "Schedule", "ScheduleRequest"]
