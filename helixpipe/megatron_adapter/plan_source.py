"""Where a ``forward_backward_func`` has its plan from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from helixpipe.plan import Plan, ScheduleRequest, build_plan
from helixpipe.plan.fit import check_fits


class PlanSource(Protocol):
    """Gives the training plan for the sizes of a call; an evaluation runs the forward half of it."""

    @property
    def schedule(self) -> str:
        """Name of the schedule."""

    @property
    def chunks_per_rank(self) -> int:
        """Segments of each rank, where each is a model chunk."""

    def plan_for(self, *, num_layers: int, num_ranks: int, num_microbatches: int) -> Plan:
        """The plan; ``ValueError`` if there is none for these sizes."""


@dataclass(frozen=True)
class GivenPlan:
    """The one plan of a program that knows its sizes beforehand."""

    plan: Plan

    def __str__(self) -> str:
        parameters = [f"{name}={value}" for name, value in self.plan.parameters.items()]
        return f"{self.schedule} ({', '.join(parameters)})"

    @property
    def schedule(self) -> str:
        """See :class:`PlanSource`."""
        return self.plan.schedule

    @property
    def chunks_per_rank(self) -> int:
        """See :class:`PlanSource`."""
        return self.plan.num_segments // self.plan.num_ranks

    def plan_for(self, *, num_layers: int, num_ranks: int, num_microbatches: int) -> Plan:
        """See :class:`PlanSource`."""
        check_fits(self.plan, num_layers=num_layers, num_ranks=num_ranks, num_microbatches=num_microbatches)
        return self.plan


@dataclass(frozen=True)
class PlanOnDemand:
    """Plans a schedule for whatever sizes it is called with, as Megatron-LM's program asks for.

    Args:
        schedule: its name.
        options: its arguments beside the sizes, as :class:`ScheduleRequest` names them.
        chunks_per_rank: model chunks on each rank.
    """

    schedule: str
    options: Mapping[str, int | str] = field(default_factory=dict)
    chunks_per_rank: int = 1

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.schedule} ({options})" if options else self.schedule

    def plan_for(self, *, num_layers: int, num_ranks: int, num_microbatches: int) -> Plan:
        """See :class:`PlanSource`."""
        request = ScheduleRequest(
            num_layers=num_layers,
            num_ranks=num_ranks,
            num_microbatches=num_microbatches,
            **self.options,  # type: ignore[arg-type]
        )
        return build_plan(self.schedule, request)
