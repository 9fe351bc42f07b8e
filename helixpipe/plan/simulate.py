"""Event simulation of a plan: when every operation runs, given costs."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass

from helixpipe.plan.costs import Costs
from helixpipe.plan.memory import peak_bytes
from helixpipe.plan.operation import Operation, input_of, output_edge
from helixpipe.plan.plan import Plan
from helixpipe.plan.timeline import Span, Timeline


@dataclass(frozen=True)
class Simulation:
    """What a plan costs.

    Attributes:
        timeline: when every compute operation runs.
        peak_bytes: activations at the peak, per rank.
    """

    timeline: Timeline
    peak_bytes: list[int]

    def to_json(self) -> str:
        """The result file of ``python -m helixpipe simulate``."""
        return json.dumps(
            {
                "makespan_ms": self.timeline.makespan_ms,
                "busy_ms": self.timeline.busy_ms,
                "bubble_ratio": self.timeline.bubble_ratio,
                "peak_bytes": self.peak_bytes,
            },
            indent=2,
        )


def simulate(plan: Plan, costs: Costs) -> Simulation:
    """Run ``plan`` against a clock, in time linear in its operations.

    An operation starts when its rank is free and its inputs have arrived. A message leaves when its
    producer ends, takes the time of its edge and overlaps compute; within a rank it is free.

    Args:
        plan: a valid plan, lowered or compute-only (the messages follow from the placement).
        costs: times and bytes by segment name.
    """
    timeline = Timeline(_Clock(plan, costs).run(), segment_names=plan.segment_names)
    return Simulation(timeline, peak_bytes(plan, costs.bytes_of_segment))


class _Clock:
    def __init__(self, plan: Plan, costs: Costs) -> None:
        self.plan = plan
        self.costs = costs
        self.orders = [[op for op in order if op.kind.is_compute] for order in plan.orders]
        self.spans: list[list[Span]] = [[] for _ in self.orders]
        self.free_ms = [0.0] * plan.num_ranks
        self.arrival_ms: dict[Operation, float] = {}  # result -> when its consumer has it
        self.waiting: dict[Operation, int] = {}

    def run(self) -> tuple[tuple[Span, ...], ...]:
        ready = deque(range(self.plan.num_ranks))
        while ready:
            rank = ready.popleft()
            order, spans = self.orders[rank], self.spans[rank]
            while len(spans) < len(order):
                op = order[len(spans)]
                start = self._start_ms(rank, op)
                if start is None:
                    break
                waiter = self._finish(rank, op, start)
                if waiter is not None:
                    ready.append(waiter)
        assert all(len(s) == len(o) for s, o in zip(self.spans, self.orders, strict=True)), (
            "the plan deadlocks; validate it first"
        )
        return tuple(tuple(spans) for spans in self.spans)

    def _start_ms(self, rank: int, op: Operation) -> float | None:
        """When the operation can start, or None while its input is not produced."""
        needed = input_of(op, self.plan.num_segments)
        if needed is None:
            return self.free_ms[rank]
        arrival = self.arrival_ms.pop(needed, None)
        if arrival is None:
            self.waiting[needed] = rank
            return None
        return max(self.free_ms[rank], arrival)

    def _finish(self, rank: int, op: Operation, start: float) -> int | None:
        """Record the operation and send its result; the rank that was waiting for it, or None."""
        names = self.plan.segment_names
        end = start + self.costs.duration_ms(
            op.kind, names[op.segment], splits_backward=self.plan.splits_backward
        )
        self.spans[rank].append(Span(op, start, end))
        self.free_ms[rank] = end
        edge = output_edge(op, self.plan.num_segments)
        if edge is None:
            return None
        crosses = self.plan.rank_of(edge[1], op.micro_batch) != rank
        first, second = sorted(edge)
        transfer = self.costs.transfer_ms(names[first], names[second]) if crosses else 0.0
        self.arrival_ms[op] = end + transfer
        return self.waiting.pop(op, None)
