"""Lowering: add the messages to a compute-only plan, each receive where it is to be posted."""

from __future__ import annotations

import heapq

from helixpipe.plan.context import ContextMessage, ContextProgress
from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Kind, Operation, input_of, message_of, output_edge
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.costs import Costs
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.simulation.timeline import Span

# Relative durations where no costs are given: they only decide which operations a receive stands between.
_NOMINAL_DURATION = {Kind.F: 2, Kind.B: 4, Kind.W: 2}
# Not none: a rank that lags a message behind its neighbour must post before its own operation ends.
_NOMINAL_TRANSFER = 1


def lower(plan: Plan, costs: Costs | None = None) -> Plan:
    """Return ``plan`` with a SEND after each producer and the matching RECV on the consumer's rank.

    A RECV is where the executor posts it; the consumer waits. It stands before the operation that its rank
    computes while the message is sent, so that it is posted by then and the message travels meanwhile.

    Weights on loan leave as the forward starts that feeds the loan's first micro batch: they travel while it
    computes, and slot by slot, so that they never stand before another slot's activations. Their gradients
    leave as the loan's last backward ends.

    Keys and values on loan leave as the last forward ends that makes them, and their gradients as the last
    reader's backward ends; after the activations that leave then, since those are needed first.

    All ranks are executed together against a clock. Operations are written into their orders as they end,
    both ends of a message as it leaves. So one order of time runs through all ranks, the orders of messages
    between two ranks can never disagree, and executing the plan in that order never blocks, even where a
    message holds up everything behind it on both of its ranks until they meet.

    Args:
        plan: without messages.
        costs: with which the plan is simulated to find out when each operation runs; if None, operations of a
            kind take equally long and messages half as long as a forward.

    Raises:
        ValueError: an operation whose input is never produced.
    """
    assert not any(not op.kind.is_compute for order in plan.orders for op in order)
    return _Lowering(plan, costs).run()


class _Lowering:
    """An execution of all ranks that writes each rank's order with messages."""

    def __init__(self, plan: Plan, costs: Costs | None) -> None:
        self.plan = plan
        self.spans = None if costs is None else _spans(plan, costs)
        self.orders: list[list[Operation]] = [[] for _ in plan.orders]
        self.next_index = [0] * plan.num_ranks
        self.idle = [True] * plan.num_ranks
        self.available: set[Operation] = set()  # results, on the ranks of their consumers
        # (time, rank, operation): it ends on this rank, or its result arrives there
        self.events: list[tuple[float, int, Operation]] = []
        # What is due when an operation starts, or when all of a loan's operations have ended.
        self.lending: dict[Operation, list[Loan]] = {}
        self.lent: set[Loan] = set()
        self.returning: dict[Operation, Loan] = {}
        self.left: dict[Loan, set[Operation]] = {}
        for loan in plan.loans:
            self._arrange(loan)
        self.contexts = ContextProgress(plan.context_index)
        self.sent: set[ContextMessage] = set()

    def run(self) -> Plan:
        for rank in range(self.plan.num_ranks):
            self._start(rank, 0)
        while self.events:
            now = self.events[0][0]
            ended, concerned = [], []
            while self.events and self.events[0][0] == now:
                _, rank, operation = heapq.heappop(self.events)
                concerned.append(rank)
                if rank == self._rank_of(operation):
                    self.idle[rank] = True
                    self.orders[rank].append(operation)
                    ended.append(operation)
                else:
                    self.available.add(operation)
            # What ends now stands before what is sent now: neither rank of two that exchange results can
            # post its receive before the operation that the other one waits for.
            for operation in ended:
                concerned += self._send(operation, now)
                # After the result, for which another rank may be waiting.
                self._return(operation)
            for operation in ended:
                concerned += self._send_contexts(self.contexts.ended(operation))
            for rank in concerned:
                self._start(rank, now)
        for rank, order in enumerate(self.plan.orders):
            if self.next_index[rank] < len(order):
                stuck = order[self.next_index[rank]]
                raise ValueError(f"rank {rank} can never run {stuck}: its input is never produced")
        return self.plan.with_orders(self.orders)

    def _start(self, rank: int, now: float) -> None:
        order = self.plan.orders[rank]
        if not self.idle[rank] or self.next_index[rank] == len(order):
            return
        operation = order[self.next_index[rank]]
        needed = input_of(operation, self.plan.num_segments)
        if needed is not None and needed not in self.available:
            return
        if any(message not in self.sent for message in self.plan.context_index.needed_by.get(operation, ())):
            return
        self.next_index[rank] += 1
        self.idle[rank] = False
        for loan in self.lending.pop(operation, ()):
            self._lend(loan)
        for woken in self._send_contexts(self.contexts.started(operation)):
            self._start(woken, now)
        heapq.heappush(self.events, (self._end(operation, now), rank, operation))

    def _rank_of(self, operation: Operation) -> int:
        return self.plan.rank_of(operation.segment, operation.micro_batch)

    def _end(self, operation: Operation, now: float) -> float:
        """When an operation ends that can start ``now``."""
        if self.spans is None:
            return now + _NOMINAL_DURATION[operation.kind]
        return self.spans[operation].end_ms

    def _arrival(self, message_for: Operation, now: float) -> float:
        """When an operation can take its input that is sent ``now``."""
        if self.spans is None:
            return now + _NOMINAL_TRANSFER
        return self.spans[message_for].start_ms

    def _arrange(self, loan: Loan) -> None:
        first = loan.micro_batches[0]
        # The forward that feeds the loan's first; and any of its own, in case one of those comes before.
        for start in (Operation(loan.segment - 1, Kind.F, first), *loan.operations(Kind.F)):
            self.lending.setdefault(start, []).append(loan)
        if self.plan.has_backward:
            last = self.plan.completing(loan)
            self.returning.update(dict.fromkeys(last, loan))
            self.left[loan] = last

    def _lend(self, loan: Loan) -> None:
        if loan not in self.lent:
            self.lent.add(loan)
            self.orders[loan.owner].append(loan.weights_sent)
            self.orders[loan.borrower].append(loan.weights_received)

    def _return(self, operation: Operation) -> None:
        loan = self.returning.get(operation)
        if loan is None:
            return
        self.left[loan].remove(operation)
        if not self.left[loan]:
            self.orders[loan.borrower].append(loan.gradients_sent)
            self.orders[loan.owner].append(loan.gradients_received)

    def _send_contexts(self, messages: list[ContextMessage]) -> list[int]:
        """Append messages of keys and values or of their gradients; the ranks that may now go on."""
        for message in messages:
            self.orders[message.sender].append(message.send)
            self.orders[message.receiver].append(message.receive)
            self.sent.add(message)
        return [message.receiver for message in messages]

    def _send(self, operation: Operation, now: float) -> list[int]:
        """Append the message that carries the operation's result; the ranks that may now go on."""
        edge = output_edge(operation, self.plan.num_segments)
        if edge is None:
            return []
        rank, peer = self._rank_of(operation), self.plan.rank_of(edge[1], operation.micro_batch)
        if peer != rank:
            send, receive, number = message_of(operation)
            self.orders[rank].append(Operation(number, send, operation.micro_batch, peer))
            self.orders[peer].append(Operation(number, receive, operation.micro_batch, rank))
            arrival = self._arrival(operation._replace(segment=edge[1]), now)
            if arrival > now:
                heapq.heappush(self.events, (arrival, peer, operation))
                return []
        self.available.add(operation)
        return [peer]


def _spans(plan: Plan, costs: Costs) -> dict[Operation, Span]:
    return {span.operation: span for spans in simulate(plan, costs).timeline.spans for span in spans}
