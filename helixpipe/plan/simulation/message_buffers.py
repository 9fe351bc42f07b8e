"""Buffers of messages: what a rank's sends and receives hold, operation by operation.

A buffer to receive into is there from its RECV in the plan's order until the operation starts that needs it;
from then on it is part of what that operation holds. A send's buffer is there until the send is waited for,
which the executor does when too much is unfinished: :class:`UnfinishedSends` says when, for both.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from helixpipe.plan.operation import Kind, Operation, input_of
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.costs import Costs, LoanBytes
from helixpipe.plan.simulation.memory import held_bytes

# Returned gradients are waited for and added when this many more have been asked for, or at the end: the
# borrower may only just have sent them when their turn comes.
MAX_UNADDED_GRADIENTS = 2

T = TypeVar("T")


class UnfinishedSends(Generic[T]):
    """Sends that nobody has waited for, the oldest first.

    Sends complete in order per peer. A valid plan cannot deadlock even if every send were waited for at once.

    Attributes:
        max_count: so many may be unfinished.
        max_bytes: so much of more than one, so that the newest can always travel while others are computed.
        bytes: of all that are unfinished.
    """

    max_count = 16
    max_bytes = 2 * 2**30

    def __init__(self) -> None:
        self.bytes = 0
        self._sends: deque[tuple[int, T]] = deque()

    def __len__(self) -> int:
        return len(self._sends)

    def add(self, num_bytes: int, send: T) -> None:
        """A send begins."""
        self._sends.append((num_bytes, send))
        self.bytes += num_bytes

    @property
    def are_too_many(self) -> bool:
        """True if the oldest must be waited for."""
        return len(self) > self.max_count or (self.bytes > self.max_bytes and len(self) > 1)

    @property
    def oldest(self) -> T:
        """The send to be waited for."""
        return self._sends[0][1]

    def take_oldest(self) -> T:
        """Forget the oldest, which has been waited for."""
        num_bytes, send = self._sends.popleft()
        self.bytes -= num_bytes
        return send


def buffer_bytes(plan: Plan, costs: Costs, rank: int, gpus_per_rank: int = 1) -> list[int]:
    """What messages hold on a GPU of ``rank`` as each of its compute operations starts, in execution order.

    No send is taken to have completed before it is waited for. Headers, 32 bytes each, do not count; nor do
    keys and values that are received, nor their gradients: :mod:`.context_memory` has them from RECV on.

    Args:
        plan: lowered.
        costs: ``message_bytes`` and ``loan_bytes`` are those of all GPUs of a rank.
        rank: a pipeline rank.
        gpus_per_rank: GPUs that share its messages evenly. Each has buffers, and bounds them, by itself.
    """
    assert plan.is_lowered
    return _Buffers(plan, costs, rank, gpus_per_rank).run()


def peak_with_buffers(plan: Plan, costs: Costs, rank: int, gpus_per_rank: int = 1) -> int:
    """Peak bytes of a GPU of ``rank``, buffers of messages included.

    Args:
        plan: lowered.
        costs: what segments keep on one GPU; messages as in :func:`buffer_bytes`.
        rank: a pipeline rank.
        gpus_per_rank: see :func:`buffer_bytes`.
    """
    levels = zip(held_bytes(plan, costs, rank), buffer_bytes(plan, costs, rank, gpus_per_rank), strict=True)
    return max((held.during + buffers for held, buffers in levels), default=costs.rank(rank).static_bytes)


class _Buffers:
    def __init__(self, plan: Plan, costs: Costs, rank: int, gpus_per_rank: int) -> None:
        self.plan = plan
        self.gpus_per_rank = gpus_per_rank
        self.costs = costs
        self.order = plan.orders[rank]
        self.sends: UnfinishedSends[None] = UnfinishedSends()
        self.received: dict[Operation, int] = {}
        self.returned: deque[Operation] = deque()
        self.weights = {
            op: loan.weights_received
            for loan in plan.loans
            if loan.borrower == rank
            for op in loan.operations(Kind.F)
        }
        self.contexts = {
            message.send: sum(
                costs.context_message_bytes(plan.context_cost_name(i)) for i in message.context.lent
            )
            for message in plan.context_index.producers
            if message.sender == rank
        }

    def run(self) -> list[int]:
        levels = []
        for op in self.order:
            if op.kind.is_send:
                self._send(op)
            elif op.kind.is_receive:
                self._receive(op)
            else:
                self._take(op)
                levels.append(self.sends.bytes + sum(self.received.values()))
        return levels

    def _send(self, op: Operation) -> None:
        self.sends.add(self._size(op), None)
        while self.sends.are_too_many:
            self.sends.take_oldest()

    def _receive(self, op: Operation) -> None:
        if op.kind in (Kind.RECV_K, Kind.RECV_KB, Kind.RECV_D):
            return
        self.received[op] = self._size(op)
        if op.kind is Kind.RECV_G:
            self.returned.append(op)
            if len(self.returned) > MAX_UNADDED_GRADIENTS:
                del self.received[self.returned.popleft()]

    def _take(self, op: Operation) -> None:
        """The messages that an operation starts with."""
        if op in self.weights:
            self.received.pop(self.weights[op], None)
        needed = input_of(op, self.plan.num_segments)
        if needed is not None:
            self.received.pop(self.plan.receive_of(needed), None)

    def _size(self, op: Operation) -> int:
        return -(-self._size_on_all(op) // self.gpus_per_rank)

    def _size_on_all(self, op: Operation) -> int:
        if op in self.contexts:
            return self.contexts[op]
        if op.kind in (Kind.SEND_P, Kind.RECV_P, Kind.SEND_G, Kind.RECV_G):
            loan = self.costs.loan_bytes.get(self.plan.segment_names[op.segment], LoanBytes(0, 0))
            return loan.weights if op.kind in (Kind.SEND_P, Kind.RECV_P) else loan.gradients
        producer, consumer = (
            self.plan.cost_name(segment, op.micro_batch) for segment in (op.segment, op.segment + 1)
        )
        return self.costs.num_bytes(producer, consumer)
