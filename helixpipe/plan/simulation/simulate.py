"""Event simulation of a plan: when every operation runs, given costs."""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass
from typing import Any

from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Kind, Operation, input_of, output_edge
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.costs import Costs, LoanBytes
from helixpipe.plan.simulation.memory import held_bytes
from helixpipe.plan.simulation.network import Links
from helixpipe.plan.simulation.timeline import Level, Span, Timeline


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

    An operation starts when its rank is free and its inputs have arrived. A message leaves when its producer
    has ended and its receive is posted, and overlaps compute; within a rank it is free. A lowered plan posts
    a receive when the computation before it ends, a compute-only plan always in time. With ``p2p_ms`` a
    message takes the time of its edge whatever else is under way; with a network it queues for its links.
    After its last operation a rank reduces its gradients; when all have, the optimizer runs. Weights on loan
    and their gradients take the network's links like other messages; without a network they are free.

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
    return Simulation(timeline, timeline.peak_bytes, _finish_ms(timeline, costs, clock.returned_ms))


def _memory_curve(spans: list[Span], levels: list[Any], static_bytes: int) -> tuple[Level, ...]:
    curve = [Level(0.0, static_bytes)]
    for span, level in zip(spans, levels, strict=True):
        curve += (Level(span.start_ms, level.during), Level(span.end_ms, level.after))
    return tuple(curve)


def _finish_ms(timeline: Timeline, costs: Costs, returned_ms: list[float]) -> float:
    """From the pipeline's end to the iteration's: the gradient norm waits for every rank's reduction.

    A rank that lends weights reduces when the last of their gradients has come back.
    """
    if not costs.ranks:
        return 0.0
    reduced_ms = max(
        max(spans[-1].end_ms if spans else 0.0, returned) + cost.gradient_reduction_ms
        for spans, returned, cost in zip(timeline.spans, returned_ms, costs.ranks, strict=True)
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
        # (time, rank, 1 for loans, an operation that ends or a loan whose weights leave)
        self.events: list[tuple[float, int, int, Operation | Loan]] = []
        self.loans = {(loan.segment, i): loan for loan in plan.loans for i in loan.micro_batches}
        # A loan's weights leave as the forward starts that feeds its first micro batch: lowering says so.
        self.lending: dict[Operation, list[Loan]] = {}
        for loan in plan.loans:
            feeding = Operation(loan.segment - 1, Kind.F, loan.micro_batches[0])
            self.lending.setdefault(feeding, []).append(loan)
        self.weights_ms: dict[Loan, float] = {}  # when the borrower has them
        self.waiting_for_weights: dict[Loan, int] = {}
        self.returning = {
            loan: len(loan.micro_batches) for loan in plan.loans if plan.has_backward
        }  # backwards until the gradients can be returned
        self.returned_ms = [0.0] * plan.num_ranks  # when the last gradients have come back
        self.posted_after = _posts(plan)
        # (receiver, operations that end there first) -> results whose receives are not posted, and senders
        self.unposted: dict[tuple[int, int], list[tuple[Operation, int]]] = {}
        self._duration_ms = {
            (kind, name, splits): costs.duration_ms(kind, name, splits_backward=splits)
            for kind in {op.kind for order in self.orders for op in order}
            for name in plan.cost_names
            for splits in (False, True)
        }

    def run(self) -> None:
        """Fill ``spans`` and ``waits``."""
        for rank in range(self.plan.num_ranks):
            self._start(rank)
        while self.events:
            now_ms, rank, _, event = heapq.heappop(self.events)
            if isinstance(event, Loan):
                self.weights_ms[event] = self._lent_ms(event, now_ms)
                waiter = self.waiting_for_weights.pop(event, None)
            else:
                self._post(rank, now_ms)
                waiter = self._deliver(rank, event, now_ms)
                self._give_back(event, now_ms)
                self._start(rank)
            if waiter is not None:
                self._start(waiter)
        if any(len(s) != len(o) for s, o in zip(self.spans, self.orders, strict=True)):
            raise ValueError("the plan deadlocks; validate it first")

    def _start(self, rank: int) -> None:
        """Start the rank's next operation if it has its input."""
        order, spans = self.orders[rank], self.spans[rank]
        if len(spans) == len(order):
            return
        op = order[len(spans)]
        free_ms = start_ms = self.free_ms[rank]
        loan = self.loans.get((op.segment, op.micro_batch)) if op.kind is Kind.F else None
        if loan is not None:
            if loan not in self.weights_ms:
                self.waiting_for_weights[loan] = rank
                return
            start_ms = max(start_ms, self.weights_ms[loan])
        needed = input_of(op, self.plan.num_segments)
        if needed is not None:
            arrival_ms = self.arrival_ms.pop(needed, None)
            if arrival_ms is None:
                self.waiting[needed] = rank
                return
            if arrival_ms > start_ms:
                start_ms = arrival_ms
                self.waits[rank].append(Span(self.plan.receive_of(needed), free_ms, start_ms))
            elif loan is not None and start_ms > free_ms:
                self.waits[rank].append(Span(loan.weights_received, free_ms, start_ms))
            start_ms += self._receive_ms.pop(needed, 0.0)
        name = self.plan.cost_name(op.segment, op.micro_batch)
        splits = op.micro_batch in self.plan.split_micro_batches
        end_ms = start_ms + self._duration_ms[op.kind, name, splits]
        spans.append(Span(op, start_ms, end_ms))
        self.free_ms[rank] = end_ms
        for lent in self.lending.get(op, ()):
            heapq.heappush(self.events, (start_ms, lent.owner, 1, lent))
        heapq.heappush(self.events, (end_ms, rank, 0, op))

    def _lent_ms(self, loan: Loan, ready_ms: float) -> float:
        """When the borrower has a loan's weights."""
        if self.links is None:
            return ready_ms
        return self.links.send(self._loan_bytes(loan).weights, loan.owner, loan.borrower, ready_ms)

    def _give_back(self, op: Operation, end_ms: float) -> None:
        """After the last B or W of a loan, return the gradients of its weights to their owner."""
        loan = self.loans.get((op.segment, op.micro_batch))
        if loan not in self.returning or op.kind is not self.plan.last_kind(op.micro_batch):
            return
        self.returning[loan] -= 1
        if self.returning[loan] == 0 and self.links is not None:
            arrival_ms = self.links.send(self._loan_bytes(loan).gradients, loan.borrower, loan.owner, end_ms)
            self.returned_ms[loan.owner] = max(self.returned_ms[loan.owner], arrival_ms)

    def _loan_bytes(self, loan: Loan) -> LoanBytes:
        return self.costs.loan_bytes.get(self.plan.segment_names[loan.segment], LoanBytes(0, 0))

    def _deliver(self, rank: int, op: Operation, end_ms: float) -> int | None:
        """Send the operation's result; the rank that was waiting for it, or None."""
        edge = output_edge(op, self.plan.num_segments)
        if edge is None:
            return None
        peer = self.plan.rank_of(edge[1], op.micro_batch)
        if peer == rank:
            self.arrival_ms[op] = end_ms
            return self.waiting.pop(op, None)
        if self.links is not None:
            self.free_ms[rank] += self.links.network.send_ms(self._num_bytes(edge, op.micro_batch))
        start_ms = max(end_ms, self.free_ms[rank])
        posted_after = self.posted_after.get((peer, self.plan.receive_of(op)), 0)
        if not self._has_ended(peer, posted_after, start_ms):
            self.unposted.setdefault((peer, posted_after), []).append((op, rank))
            return None
        self._transfer(op, rank, peer, start_ms)
        return self.waiting.pop(op, None)

    def _has_ended(self, rank: int, count: int, now_ms: float) -> bool:
        """True if so many operations of a rank end by now, even if the event of the last is still to come."""
        spans = self.spans[rank]
        return count == 0 or (len(spans) >= count and spans[count - 1].end_ms <= now_ms)

    def _post(self, rank: int, now_ms: float) -> None:
        """Let messages leave whose receives follow the operation that has just ended on ``rank``."""
        for op, sender in self.unposted.pop((rank, len(self.spans[rank])), ()):
            self._transfer(op, sender, rank, now_ms)

    def _transfer(self, op: Operation, rank: int, peer: int, start_ms: float) -> None:
        edge = output_edge(op, self.plan.num_segments)
        assert edge is not None
        if self.links is None:
            first, second = (self.plan.cost_name(segment, op.micro_batch) for segment in sorted(edge))
            self.arrival_ms[op] = start_ms + self.costs.transfer_ms(first, second)
            return
        num_bytes = self._num_bytes(edge, op.micro_batch)
        self._receive_ms[op] = self.links.network.receive_ms(num_bytes)
        self.arrival_ms[op] = self.links.send(num_bytes, rank, peer, start_ms)

    def _num_bytes(self, edge: tuple[int, int], micro_batch: int) -> int:
        return self.costs.num_bytes(*(self.plan.cost_name(segment, micro_batch) for segment in sorted(edge)))


def _posts(plan: Plan) -> dict[tuple[int, Operation], int]:
    """How many computations precede each receive on its rank; empty for a plan without messages."""
    posts = {}
    for rank, order in enumerate(plan.orders):
        num_computed = 0
        for op in order:
            if op.kind.is_compute:
                num_computed += 1
            elif op.kind.is_receive:
                posts[rank, op] = num_computed
    return posts
