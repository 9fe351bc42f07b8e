"""Schedules: one short file each, which places segments on ranks and orders their F, B and W.

A schedule is a function from a :class:`ScheduleRequest` to a compute-only plan. Messages, buffers and
checks come from the passes that all schedules share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules import (
    dualpipe_v,
    gpipe,
    helix,
    interleaved,
    one_f_one_b,
    seq1f1b,
    v_half,
    v_min,
    zb_h1,
    zb_v,
)
from helixpipe.plan.schedules.request import ScheduleRequest


class Schedule(NamedTuple):
    """A registered schedule: its planner and the optional arguments that mean something to it."""

    plan: Callable[[ScheduleRequest], Plan]
    options: frozenset[str] = frozenset()


SCHEDULES: Mapping[str, Schedule] = {
    "gpipe": Schedule(gpipe.plan),
    "1f1b": Schedule(one_f_one_b.plan),
    "interleaved": Schedule(interleaved.plan, frozenset({"virtual_stages"})),
    "zb-h1": Schedule(zb_h1.plan),
    "zb-v": Schedule(zb_v.plan),
    "v-half": Schedule(v_half.plan),
    "v-min": Schedule(v_min.plan),
    "dualpipe-v": Schedule(dualpipe_v.plan),
    "seq1f1b": Schedule(seq1f1b.plan, frozenset({"num_slices"})),
    "helix": Schedule(helix.plan, frozenset({"num_fold", "attention_range", "head_placement"})),
}

# Two stages per rank, the second half of them in reverse order: the loss is on the first rank.
V_SHAPED = ("zb-v", "v-half", "v-min", "dualpipe-v")

__all__ = ["SCHEDULES", "V_SHAPED", "Schedule", "ScheduleRequest"]
