"""GPipe: all forwards, then all backwards (Huang et al. 2019, section 2.3)."""

from __future__ import annotations

from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.request import ScheduleRequest, stage_plan


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only GPipe plan."""
    return stage_plan(
        "gpipe",
        request,
        (
            [
                Operation(rank, kind, micro_batch)
                for kind in (Kind.F, Kind.B)
                for micro_batch in range(request.num_microbatches)
            ]
            for rank in range(request.num_ranks)
        ),
    )
