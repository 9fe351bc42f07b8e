"""Event simulation of a plan: when every operation runs, given costs."""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from helixpipe.plan.context import ContextMessage, ContextProgress
from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Kind, Operation, input_of, output_edge
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.costs import Costs, LoanBytes
from helixpipe.plan.simulation.memory import held_bytes
from helixpipe.plan.simulation.network import Links
from helixpipe.plan.simulation.timeline import Level, Span, Timeline

# What arrives: the result of a computation, or a context's keys and values or gradients.
_Content: TypeAlias = Operation | ContextMessage


class _Message(NamedTuple):
    """A message that may leave."""

    content: _Content
    sender: int
    receiver: int
    receive: Operation
    num_bytes: int
    milliseconds: float  # without a network


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
    and their gradients take the network's links like other messages; without a network they are free. Keys
    and values on loan leave when the last forward ends that makes them, their gradients when the last
    reader's backward ends, behind the activations that leave then.

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
        self.arrival_ms: dict[_Content, float] = {}  # when its consumer has it
        self._receive_ms: dict[_Content, float] = {}  # what its consumer spends on the message first
        self.waiting: dict[_Content, int] = {}
        # (time, rank, 0 for an operation that ends, 1 for a loan whose weights leave, 2 for a context's)
        self.events: list[tuple[float, int, int, Operation | Loan | ContextMessage]] = []
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
        # (receiver, operations that end there first) -> messages whose receives are not posted
        self.unposted: dict[tuple[int, int], list[_Message]] = {}
        self.contexts = ContextProgress(plan.context_index)
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
                waiters = [self.waiting_for_weights.pop(event, None)]
            elif isinstance(event, ContextMessage):
                waiters = [self._leave(self._of_context(event), now_ms)]
            else:
                self._post(rank, now_ms)
                waiters = [self._deliver(rank, event, now_ms)]
                messages = map(self._of_context, self.contexts.ended(event))
                waiters += [self._leave(message, now_ms) for message in messages]
                self._give_back(event, now_ms)
                self._start(rank)
            for waiter in waiters:
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
        contents = self._contents_for(op)
        for content in contents:
            if content not in self.arrival_ms:
                self.waiting[content] = rank
                return
        waited_for = None if loan is None or start_ms == free_ms else loan.weights_received
        for content in contents:
            if self.arrival_ms[content] > start_ms:
                start_ms, waited_for = self.arrival_ms[content], self._receive_of(content)
        if waited_for is not None:
            self.waits[rank].append(Span(waited_for, free_ms, start_ms))
        start_ms += sum(self._receive_ms.pop(content, 0.0) for content in contents)
        name = self.plan.cost_name(op.segment, op.micro_batch)
        splits = op.micro_batch in self.plan.split_micro_batches
        end_ms = start_ms + self._duration_ms[op.kind, name, splits]
        spans.append(Span(op, start_ms, end_ms))
        self.free_ms[rank] = end_ms
        for lent in self.lending.get(op, ()):
            heapq.heappush(self.events, (start_ms, lent.owner, 1, lent))
        for message in self.contexts.started(op):
            heapq.heappush(self.events, (start_ms, message.sender, 2, message))
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

    def _contents_for(self, op: Operation) -> list[_Content]:
        """What an operation starts with."""
        needed = input_of(op, self.plan.num_segments)
        messages = self.plan.context_index.needed_by.get(op, [])
        return [*messages] if needed is None else [needed, *messages]

    def _receive_of(self, content: _Content) -> Operation:
        return content.receive if isinstance(content, ContextMessage) else self.plan.receive_of(content)

    def _deliver(self, rank: int, op: Operation, end_ms: float) -> int | None:
        """Send the operation's result; the rank that was waiting for it, or None."""
        edge = output_edge(op, self.plan.num_segments)
        if edge is None:
            return None
        peer = self.plan.rank_of(edge[1], op.micro_batch)
        if peer == rank:
            self.arrival_ms[op] = end_ms
            return self.waiting.pop(op, None)
        names = [self.plan.cost_name(segment, op.micro_batch) for segment in sorted(edge)]
        num_bytes, milliseconds = self.costs.num_bytes(*names), self.costs.transfer_ms(*names)
        receive = self.plan.receive_of(op)
        return self._leave(_Message(op, rank, peer, receive, num_bytes, milliseconds), end_ms)

    def _of_context(self, message: ContextMessage) -> _Message:
        names = [self.plan.context_cost_name(i) for i in message.context.lent]
        num_bytes = sum(map(self.costs.context_message_bytes, names))
        milliseconds = sum(map(self.costs.context_ms, names))
        return _Message(message, message.sender, message.receiver, message.receive, num_bytes, milliseconds)

    def _leave(self, message: _Message, now_ms: float) -> int | None:
        """Send a message, or keep it until its receive is posted; the rank that waited for it, or None."""
        sender, receiver = message.sender, message.receiver
        if self.links is not None:
            self.free_ms[sender] += self.links.network.send_ms(message.num_bytes)
        start_ms = max(now_ms, self.free_ms[sender]) if self._is_between(sender, now_ms) else now_ms
        posted_after = self.posted_after.get((receiver, message.receive), 0)
        if not self._has_ended(receiver, posted_after, start_ms):
            self.unposted.setdefault((receiver, posted_after), []).append(message)
            return None
        self._transfer(message, start_ms)
        return self.waiting.pop(message.content, None)

    def _is_between(self, rank: int, now_ms: float) -> bool:
        """True if a rank computes nothing at ``now_ms``; until it is free, it handles messages."""
        return not self.spans[rank] or self.spans[rank][-1].end_ms <= now_ms

    def _has_ended(self, rank: int, count: int, now_ms: float) -> bool:
        """True if so many operations of a rank end by now, even if the event of the last is still to come."""
        spans = self.spans[rank]
        return count == 0 or (len(spans) >= count and spans[count - 1].end_ms <= now_ms)

    def _post(self, rank: int, now_ms: float) -> None:
        """Let messages leave whose receives follow the operation that has just ended on ``rank``."""
        for message in self.unposted.pop((rank, len(self.spans[rank])), ()):
            self._transfer(message, now_ms)

    def _transfer(self, message: _Message, start_ms: float) -> None:
        content = message.content
        if self.links is None:
            self.arrival_ms[content] = start_ms + message.milliseconds
            return
        self._receive_ms[content] = self.links.network.receive_ms(message.num_bytes)
        self.arrival_ms[content] = self.links.send(
            message.num_bytes, message.sender, message.receiver, start_ms
        )


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
