"""Elastic 1F1B or elastic helix: which is predicted to end a batch first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from helixpipe.elastic import chunk_schedule, round_schedule
from helixpipe.elastic.elastic_plan import ElasticPlan
from helixpipe.elastic.job import ElasticJob
from helixpipe.elastic.search import planner
from helixpipe.elastic.search.round_planner import plan_rounds

AUTO = "auto"
# Where helix is the rival, 1F1B is tried with more slices, too, than are worth the time otherwise.
SLICE_COUNTS = (*planner.SLICE_COUNTS, 48, 64)
SCHEDULES = (chunk_schedule.SCHEDULE, round_schedule.SCHEDULE)


@dataclass(frozen=True)
class Choice:
    """The plan that is predicted to be the fastest of those that fit, and the others.

    Attributes:
        plan: the choice.
        others: by schedule, the plan that lost or why there is none.
    """

    plan: ElasticPlan
    others: Mapping[str, ElasticPlan | str]

    @property
    def reason(self) -> str:
        """In one line which schedule was chosen, and why."""
        own = self.plan.prediction
        name = self.plan.plan.schedule
        if not self.others:
            return f"{name}, as asked for."
        ((other, found),) = self.others.items()
        if isinstance(found, str):
            return f"{name}, since {other} has no plan: {found}"
        lost = found.prediction
        ratio = lost.time_ms / own.time_ms
        return (
            f"{name} is predicted to take {own.time_ms / 1e3:.4g} s, {other} {lost.time_ms / 1e3:.4g} s "
            f"({ratio:.3f}x): bubble {own.bubble:.1%} against {lost.bubble:.1%}, recomputation "
            f"{own.recompute:.1%} against {lost.recompute:.1%}."
        )


def choose_plan(
    lengths: Sequence[int],
    job: ElasticJob,
    *,
    slice_counts: Sequence[int] | None = None,
) -> Choice:
    """Plan a batch by the schedule of the job, or by each, and take the fastest plan that fits.

    Args:
        lengths: tokens of every sequence.
        job: what it is planned for; its schedule is one of ``SCHEDULES``, or ``AUTO`` for the fastest.
        slice_counts: see :func:`.planner.plan_batch`; None for the usual ones, and up to 64 with ``AUTO``.
            Elastic helix has as many slices as its slots ask for.

    Raises:
        ValueError: nothing that is asked for fits; the message says what lacks.
    """
    counts = slice_counts or (SLICE_COUNTS if job.schedule == AUTO else planner.SLICE_COUNTS)
    planners: dict[str, Callable[[], ElasticPlan]] = {
        chunk_schedule.SCHEDULE: lambda: planner.plan_batch(lengths, job, slice_counts=counts),
        round_schedule.SCHEDULE: lambda: plan_rounds(lengths, job),
    }
    if job.schedule != AUTO:
        return Choice(planners[job.schedule](), {})
    plans: dict[str, ElasticPlan] = {}
    reasons: dict[str, str] = {}
    for name, plan in planners.items():
        try:
            plans[name] = plan()
        except ValueError as error:
            reasons[name] = str(error)
    if not plans:
        raise ValueError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    best = min(plans, key=lambda name: plans[name].prediction.time_ms)
    others = {name: plans.get(name, reasons.get(name, "")) for name in planners if name != best}
    return Choice(plans[best], others)
