"""Event simulation of a plan: when every operation runs, given costs."""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass
from typing import Any

from helixpipe.plan.costs import Costs
from helixpipe.plan.memory import held_bytes
from helixpipe.plan.network import Links
from helixpipe.plan.operation import Operation, input_of, message_of, output_edge
from helixpipe.plan.plan import Plan
from helixpipe.plan.timeline import Level, Span, Timeline


@dataclass(frozen=True)
class Simulation:
    """What a plan costs.

    Attributes:
        timeline: when every compute operation runs, which messages are waited for, memory over time.
        peak_bytes: at the peak, per rank: activations, workspace, and static bytes where the costs give them.
        finish_ms: gradient reduction and optimizer step that follow the pipeline.
    """

    timeline: Timeline
    peak_bytes: list[int]
    finish_ms: float = 0.0

    @property
    def iteration_ms(self) -> float:
        """The whole iteration: pipeline, gradient reduction, optimizer."""
        return self.timeline.makespan_ms + self.finish_ms

    def to_json(self) -> str:
        """The result file of ``python -m helixpipe simulate``; ``iteration_ms`` if more than the pipeline."""
        result: dict[str, Any] = {
            "makespan_ms": self.timeline.makespan_ms,
            "busy_ms": self.timeline.busy_ms,
            "bubble_ratio": self.timeline.bubble_ratio,
            "peak_bytes": self.peak_bytes,
        }
        if self.finish_ms:
            result["iteration_ms"] = self.iteration_ms
        return json.dumps(result, indent=2)


def simulate(plan: Plan, costs: Costs) -> Simulation:
    """Run ``plan`` against a clock, in time that grows with its operations (n log p).

    An operation starts when its rank is free and its inputs have arrived. A message leaves when its
    producer ends and overlaps compute; within a rank it is free. With ``p2p_ms`` it takes the time of its
    edge whatever else is under way; with a network it queues for its links. After its last operation a
    rank reduces its gradients; when all have, the optimizer runs.

    Args:
        plan: a valid plan, lowered or compute-only (the messages follow from the placement).
        costs: times and bytes by cost name.
    """
    clock = _Clock(plan, costs)
    clock.run()
    held = [held_bytes(plan, costs, rank) for rank in range(plan.num_ranks)]
    timeline = Timeline(
        tuple(tuple(spans) for spans in clock.spans),
        segment_names=plan.segment_names,
        waits=tuple(tuple(waits) for waits in clock.waits),
        memory=tuple(
            _memory_curve(spans, levels, costs.rank(rank).static_bytes)
            for rank, (spans, levels) in enumerate(zip(clock.spans, held, strict=True))
        ),
    )
    return Simulation(timeline, timeline.peak_bytes, _finish_ms(timeline, costs))


def _memory_curve(spans: list[Span], levels: list[Any], static_bytes: int) -> tuple[Level, ...]:
    curve = [Level(0.0, static_bytes)]
    for span, level in zip(spans, levels, strict=True):
        curve += (Level(span.start_ms, level.during), Level(span.end_ms, level.after))
    return tuple(curve)


def _finish_ms(timeline: Timeline, costs: Costs) -> float:
    """From the pipeline's end to the iteration's: the gradient norm waits for every rank's reduction."""
    if not costs.ranks:
        return 0.0
    reduced_ms = max(
        (spans[-1].end_ms if spans else 0.0) + cost.gradient_reduction_ms
        for spans, cost in zip(timeline.spans, costs.ranks, strict=True)
    )
    end_ms = timeline.start_ms + timeline.makespan_ms
    return reduced_ms - end_ms + max(cost.optimizer_ms for cost in costs.ranks)


class _Clock:
    """Ends operations in the order of time, so that messages queue for links in the order they are ready."""

    def __init__(self, plan: Plan, costs: Costs) -> None:
        self.plan = plan
        self.costs = costs
        self.links = None if costs.network is None else Links(costs.network)
        self.orders = [[op for op in order if op.kind.is_compute] for order in plan.orders]
        self.spans: list[list[Span]] = [[] for _ in self.orders]
        self.waits: list[list[Span]] = [[] for _ in self.orders]
        self.free_ms = [0.0] * plan.num_ranks
        self.arrival_ms: dict[Operation, float] = {}  # result -> when its consumer has it
        self._receive_ms: dict[Operation, float] = {}  # what its consumer spends on the message first
        self.waiting: dict[Operation, int] = {}
        self.running: list[tuple[float, int, Operation]] = []  # (end, rank, operation)
        self._duration_ms = {
            (kind, name): costs.duration_ms(kind, name, splits_backward=plan.splits_backward)
            for kind in {op.kind for order in self.orders for op in order}
            for name in plan.cost_names
        }

    def run(self) -> None:
        """Fill ``spans`` and ``waits``."""
        for rank in range(self.plan.num_ranks):
            self._start(rank)
        while self.running:
            end_ms, rank, op = heapq.heappop(self.running)
            consumer = self._deliver(rank, op, end_ms)
            self._start(rank)
            if consumer is not None:
                self._start(consumer)
        assert all(len(s) == len(o) for s, o in zip(self.spans, self.orders, strict=True)), (
            "the plan deadlocks; validate it first"
        )

    def _start(self, rank: int) -> None:
        """Start the rank's next operation if it has its input."""
        order, spans = self.orders[rank], self.spans[rank]
        if len(spans) == len(order):
            return
        op = order[len(spans)]
        free_ms = start_ms = self.free_ms[rank]
        needed = input_of(op, self.plan.num_segments)
        if needed is not None:
            arrival_ms = self.arrival_ms.pop(needed, None)
            if arrival_ms is None:
                self.waiting[needed] = rank
                return
            if arrival_ms > free_ms:
                start_ms = arrival_ms
                self._note_wait(rank, needed, free_ms, start_ms)
            start_ms += self._receive_ms.pop(needed, 0.0)
        end_ms = start_ms + self._duration_ms[op.kind, self.plan.cost_name(op.segment, op.micro_batch)]
        spans.append(Span(op, start_ms, end_ms))
        self.free_ms[rank] = end_ms
        heapq.heappush(self.running, (end_ms, rank, op))

    def _note_wait(self, rank: int, needed: Operation, start_ms: float, end_ms: float) -> None:
        _, receive, edge = message_of(needed)
        peer = self.plan.rank_of(needed.segment, needed.micro_batch)
        self.waits[rank].append(Span(Operation(edge, receive, needed.micro_batch, peer), start_ms, end_ms))

    def _deliver(self, rank: int, op: Operation, end_ms: float) -> int | None:
        """Send the operation's result; the rank that was waiting for it, or None."""
        edge = output_edge(op, self.plan.num_segments)
        if edge is None:
            return None
        peer = self.plan.rank_of(edge[1], op.micro_batch)
        if peer == rank:
            self.arrival_ms[op] = end_ms
        else:
            first, second = (self.plan.cost_name(segment, op.micro_batch) for segment in sorted(edge))
            if self.links is None:
                self.arrival_ms[op] = end_ms + self.costs.transfer_ms(first, second)
            else:
                num_bytes = self.costs.num_bytes(first, second)
                self.free_ms[rank] += self.links.network.send_ms(num_bytes)
                self._receive_ms[op] = self.links.network.receive_ms(num_bytes)
                self.arrival_ms[op] = self.links.send(num_bytes, rank, peer, self.free_ms[rank])
        return self.waiting.pop(op, None)
