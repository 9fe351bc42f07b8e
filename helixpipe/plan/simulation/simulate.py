"""Event simulation of a plan: when every operation runs, given costs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.clock import Clock
from helixpipe.plan.simulation.costs import Costs
from helixpipe.plan.simulation.memory import Held, held_bytes, peak_bytes
from helixpipe.plan.simulation.timeline import Level, Span, Timeline


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a plan costs.

    Attributes:
        plan: that was simulated.
        costs: with which.
        clock: that has run.
    """

    plan: Plan
    costs: Costs
    clock: Clock

    @cached_property
    def timeline(self) -> Timeline:
        """When every compute operation runs, which messages are waited for, memory over time."""
        work, wiring, clock = self.plan.computations, self.plan.wiring, self.clock
        spans = list(map(Span, work.operations, clock.starts_ms, clock.ends_ms))
        rows = tuple(tuple(spans[begin:end]) for begin, end in pairwise(work.begins))
        held = [held_bytes(self.plan, self.costs, rank) for rank in range(self.plan.num_ranks)]
        return Timeline(
            rows,
            segment_names=self.plan.segment_names,
            waits=tuple(
                tuple(Span(wiring.receive_of(content), start, end) for content, start, end in waits)
                for waits in clock.waits
            ),
            memory=tuple(
                _memory_curve(row, levels, self.costs.rank(rank).static_bytes)
                for rank, (row, levels) in enumerate(zip(rows, held, strict=True))
            ),
        )

    @cached_property
    def peak_bytes(self) -> list[int]:
        """At the peak, per rank: activations, workspace, and static bytes where the costs give them."""
        return peak_bytes(self.plan, self.costs)

    @property
    def start_ms(self) -> float:
        """The first start over all ranks; 0 if nothing runs."""
        return min(self.clock.starts_ms, default=0.0)

    @cached_property
    def makespan_ms(self) -> float:
        """From the first start to the last end over all ranks."""
        return max(self.clock.ends_ms, default=0.0) - self.start_ms

    @property
    def bubble_ratio(self) -> float:
        """Share of the ranks' time in which nothing is computed."""
        if self.makespan_ms == 0:
            return 0.0
        busy_ms = sum(self.clock.ends_ms) - sum(self.clock.starts_ms)
        return 1.0 - busy_ms / (self.plan.num_ranks * self.makespan_ms)

    @cached_property
    def finish_ms(self) -> float:
        """Gradient reduction and optimizer step that follow the pipeline.

        The gradient norm waits for every rank's reduction. A rank that lends weights reduces when the last of
        their gradients has come back.
        """
        if not self.costs.ranks:
            return 0.0
        ends_ms = self.clock.ends_ms
        reduced_ms = max(
            max(ends_ms[end - 1] if end > begin else 0.0, returned) + cost.gradient_reduction_ms
            for (begin, end), returned, cost in zip(
                pairwise(self.plan.computations.begins), self.clock.returned_ms, self.costs.ranks, strict=True
            )
        )
        end_ms = self.start_ms + self.makespan_ms
        return reduced_ms - end_ms + max(cost.optimizer_ms for cost in self.costs.ranks)

    @property
    def iteration_ms(self) -> float:
        """The whole iteration: pipeline, gradient reduction, optimizer."""
        return self.makespan_ms + self.finish_ms

    def to_json(self) -> str:
        """The result file of ``python -m helixpipe simulate``; ``iteration_ms`` if more than the pipeline."""
        result: dict[str, Any] = {
            "makespan_ms": self.makespan_ms,
            "busy_ms": self.timeline.busy_ms,
            "bubble_ratio": self.timeline.bubble_ratio,
            "peak_bytes": self.peak_bytes,
        }
        if self.finish_ms:
            result["iteration_ms"] = self.iteration_ms
        return json.dumps(result, indent=2)


def simulate(plan: Plan, costs: Costs) -> Simulation:
    """Run ``plan`` against a clock, in time that grows with its operations (n log p).

    An operation starts when its rank is free and its inputs have arrived. A message leaves when its producer
    has ended and its receive is posted, and overlaps compute; within a rank it is free. A lowered plan posts
    a receive when the computation before it ends, a compute-only plan always in time. With ``p2p_ms`` a
    message takes the time of its edge whatever else is under way; with a network it queues for its links.
    After its last operation a rank reduces its gradients; when all have, the optimizer runs. Weights on loan
    and their gradients take the network's links like other messages; without a network they are free. Keys
    and values on loan leave when the last forward ends that makes them, their gradients when the last
    reader's backward ends, behind the activations that leave then.

    Args:
        plan: a valid plan, lowered or compute-only (the messages follow from the placement).
        costs: times and bytes by cost name.
    """
    clock = Clock(plan, costs)
    clock.run()
    return Simulation(plan, costs, clock)


def simulate_until(plan: Plan, costs: Costs, deadline_ms: float) -> Simulation | None:
    """The same as :func:`simulate`, but given up, None, as soon as the last computation must end too late.

    A rank's own work that is left bounds its end from below. What ends by ``deadline_ms`` is never given up.
    """
    clock = Clock(plan, costs, deadline_ms)
    return Simulation(plan, costs, clock) if clock.run() else None


def _memory_curve(spans: tuple[Span, ...], levels: list[Held], static_bytes: int) -> tuple[Level, ...]:
    curve = [Level(0.0, static_bytes)]
    for span, level in zip(spans, levels, strict=True):
        curve += (Level(span.start_ms, level.during), Level(span.end_ms, level.after))
    return tuple(curve)
