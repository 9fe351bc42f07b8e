"""Lowering: add the messages to a compute-only plan."""

from __future__ import annotations

import heapq

from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Kind, Operation, input_of, message_of, output_edge
from helixpipe.plan.plan import Plan

# Relative durations, used only to decide next to which operation a receive stands.
_NOMINAL_DURATION = {Kind.F: 1, Kind.B: 2, Kind.W: 1}


def lower(plan: Plan) -> Plan:
    """Return ``plan`` with a SEND after each producer and the matching RECV on the consumer's rank.

    Weights on loan leave as the forward starts that feeds the loan's first micro batch: they travel while it
    computes, and slot by slot, so that they never stand before another slot's activations. Their gradients
    leave as the loan's last B or W ends.

    The sender places both ends at the same instant of a nominal execution of all ranks. The orders of
    messages between two ranks can therefore never disagree, and executing the instants one by one
    never blocks, even if every send waits for its receive.
    """
    assert not any(not op.kind.is_compute for order in plan.orders for op in order)
    return _Lowering(plan).run()


class _Lowering:
    """A nominal execution of all ranks that writes each rank's order with messages."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.orders: list[list[Operation]] = [[] for _ in plan.orders]
        self.next_index = [0] * plan.num_ranks
        self.idle = [True] * plan.num_ranks
        self.done: set[Operation] = set()
        self.running: list[tuple[int, int, Operation]] = []  # (end, rank, operation)
        # What is due when an operation starts, or when all of a loan's operations have ended.
        self.lending: dict[Operation, list[Loan]] = {}
        self.lent: set[Loan] = set()
        self.returning: dict[Operation, Loan] = {}
        self.left: dict[Loan, set[Operation]] = {}
        for loan in plan.loans:
            self._arrange(loan)

    def run(self) -> Plan:
        for rank in range(self.plan.num_ranks):
            self._start(rank, 0)
        while self.running:
            now = self.running[0][0]
            finished = []
            # All that ends now is sent before anything starts, so receives stand before the next compute.
            while self.running and self.running[0][0] == now:
                _, rank, operation = heapq.heappop(self.running)
                self.idle[rank] = True
                self.done.add(operation)
                finished.append(rank)
                peer = self._send(rank, operation)
                # After the result, for which another rank may be waiting.
                self._return(operation)
                if peer is not None:
                    finished.append(peer)
            for rank in finished:
                self._start(rank, now)
        for rank, order in enumerate(self.plan.orders):
            if self.next_index[rank] < len(order):
                stuck = order[self.next_index[rank]]
                raise ValueError(f"rank {rank} can never run {stuck}: its input is never produced")
        return self.plan.with_orders(self.orders)

    def _start(self, rank: int, now: int) -> None:
        order = self.plan.orders[rank]
        if not self.idle[rank] or self.next_index[rank] == len(order):
            return
        operation = order[self.next_index[rank]]
        needed = input_of(operation, self.plan.num_segments)
        if needed is not None and needed not in self.done:
            return
        self.next_index[rank] += 1
        self.idle[rank] = False
        for loan in self.lending.pop(operation, ()):
            self._lend(loan)
        self.orders[rank].append(operation)
        heapq.heappush(self.running, (now + _NOMINAL_DURATION[operation.kind], rank, operation))

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

    def _send(self, rank: int, operation: Operation) -> int | None:
        """Append the message that carries the operation's result; the rank that may now go on, or None."""
        edge = output_edge(operation, self.plan.num_segments)
        if edge is None:
            return None
        peer = self.plan.rank_of(edge[1], operation.micro_batch)
        if peer != rank:
            send, receive, number = message_of(operation)
            self.orders[rank].append(Operation(number, send, operation.micro_batch, peer))
            self.orders[peer].append(Operation(number, receive, operation.micro_batch, rank))
        return peer
