"""The place of schedules that plan every batch by the sequences in it, like :mod:`helixpipe.elastic`."""

from __future__ import annotations

from typing import NoReturn

from helixpipe.plan.schedules.request import ScheduleRequest


def plan(request: ScheduleRequest) -> NoReturn:
    """Raise ``ValueError``: sizes alone do not make a plan."""
    raise ValueError(
        "elastic schedules plan every batch by the lengths of its sequences; use python -m helixpipe elastic"
    )
