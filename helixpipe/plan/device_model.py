"""What NCCL and CUDA really do with a plan: whether its kernels can all run.

The host of each rank enqueues the plan's operations in their order and hardly ever waits. Computations go to
one stream, messages to others; streams share hardware queues, and in a queue whatever waits holds up all
that was enqueued after it, also that of other streams. A message waits for its peer's end, and both ends for
what their hosts enqueued for computing before them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from helixpipe.plan.operation import Kind, Operation, input_of
from helixpipe.plan.plan import Plan

Pair: TypeAlias = tuple[int, int]

_COMPUTE = "compute"


@dataclass(frozen=True)
class DeviceModel:
    """How devices and transport may hold up a plan's operations.

    Attributes:
        name: for messages to the user.
        num_queues: hardware queues of a device (``CUDA_DEVICE_MAX_CONNECTIONS``), dealt to streams in turn.
        has_pair_streams: messages of every ordered pair of ranks have a stream; else those to higher and
            those to lower ranks have one each, as in a group with one communicator.
        connects_lazily: a host waits in the first message of an ordered pair until the other host is there.
    """

    name: str
    num_queues: int
    has_pair_streams: bool = True
    connects_lazily: bool = False


# The first is the strictest: where a plan ends, every operation can wait for all that stand before it on its
# rank, and in no other model does one wait for more than some of those and its peer. It is the same as sends
# that wait for their receives, both in the plan's order.
DEVICE_MODELS = (
    DeviceModel("one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1)", 1),
    DeviceModel("8 hardware queues", 8),
    DeviceModel("32 hardware queues", 32),
    DeviceModel("one stream per communicator", 32, has_pair_streams=False),
    DeviceModel("connections made at the first message", 32, connects_lazily=True),
)


def find_stall(plan: Plan, model: DeviceModel) -> dict[int, int]:
    """Run a lowered plan without clocks; which operation each rank is stuck at.

    Returns:
        rank -> index into its order of the first operation that never ends; empty if all end.
    """
    return _Devices(plan, model).stuck()


class _Rank:
    """One rank's host and device."""

    def __init__(self, plan: Plan, model: DeviceModel, rank: int) -> None:
        self.order = plan.orders[rank]
        self.index = {op: index for index, op in enumerate(self.order)}
        self.queues: dict[int, deque[int]] = {}
        self.num_computed_before: list[int] = []
        streams: dict[Hashable, int] = {_COMPUTE: 0}
        num_computed = 0
        for index, op in enumerate(self.order):
            stream = _stream(op, rank, model)
            queue = streams.setdefault(stream, len(streams)) % model.num_queues
            self.queues.setdefault(queue, deque()).append(index)
            self.num_computed_before.append(num_computed)
            num_computed += op.kind.is_compute
        self.num_enqueued = 0
        self.num_computed = 0
        self.received: set[Operation] = set()
        self.offered: set[Operation] = set()  # messages at the head of their queues that could start
        self.connecting: set[Pair] = set()  # ordered pairs whose first message the host has reached

    @property
    def first_left(self) -> int | None:
        """Index of the first operation that has not ended."""
        return min((queue[0] for queue in self.queues.values() if queue), default=None)


def _stream(op: Operation, rank: int, model: DeviceModel) -> Hashable:
    if op.peer is None:
        return _COMPUTE
    pair = _pair(op, rank)
    return pair if model.has_pair_streams else pair[0] < pair[1]


def _pair(op: Operation, rank: int) -> Pair:
    """Sender and receiver of a message."""
    assert op.peer is not None
    return (rank, op.peer) if op.kind.is_send else (op.peer, rank)


class _Devices:
    """All ranks: whoever may have become able to go on is visited again."""

    def __init__(self, plan: Plan, model: DeviceModel) -> None:
        assert plan.is_lowered
        self.plan = plan
        self.model = model
        self.ranks = [_Rank(plan, model, rank) for rank in range(plan.num_ranks)]
        self.weights = {op: loan.weights_received for loan in plan.loans for op in loan.operations(Kind.F)}
        self.awake = deque(range(plan.num_ranks))

    def stuck(self) -> dict[int, int]:
        while self.awake:
            rank = self.awake.popleft()
            while self._enqueue(rank) or any(self._work(rank, queue) for queue in self.ranks[rank].queues):
                pass
        left = {rank: state.first_left for rank, state in enumerate(self.ranks)}
        return {rank: index for rank, index in left.items() if index is not None}

    def _enqueue(self, rank: int) -> bool:
        """Let the host go on as far as it can; False if it cannot."""
        state = self.ranks[rank]
        before = state.num_enqueued
        while state.num_enqueued < len(state.order):
            op = state.order[state.num_enqueued]
            if self.model.connects_lazily and op.peer is not None:
                pair = _pair(op, rank)
                if pair not in state.connecting:
                    state.connecting.add(pair)
                    self.awake.append(op.peer)
                if pair not in self.ranks[op.peer].connecting:
                    break
            state.num_enqueued += 1
        return state.num_enqueued > before

    def _work(self, rank: int, queue: int) -> bool:
        """Run what can be run of a queue; False if that is nothing."""
        state, left = self.ranks[rank], self.ranks[rank].queues[queue]
        before = len(left)
        while left and left[0] < state.num_enqueued:
            op = state.order[left[0]]
            can_run = self._compute if op.kind.is_compute else self._transfer
            if not can_run(rank, op):
                break
        return len(left) < before

    def _compute(self, rank: int, op: Operation) -> bool:
        state = self.ranks[rank]
        if not all(message in state.received for message in self._messages_for(rank, op)):
            return False
        state.num_computed += 1
        self._pop(rank, op)
        return True

    def _messages_for(self, rank: int, op: Operation) -> Iterator[Operation]:
        """What a computation waits for."""
        needed = input_of(op, self.plan.num_segments)
        if needed is not None and self.plan.rank_of(needed.segment, op.micro_batch) != rank:
            yield self.plan.receive_of(needed)
        if op in self.weights:
            yield self.weights[op]
        for message in self.plan.context_index.needed_by.get(op, ()):
            yield message.receive

    def _transfer(self, rank: int, op: Operation) -> bool:
        state = self.ranks[rank]
        if state.num_computed < state.num_computed_before[state.index[op]]:
            return False
        assert op.peer is not None
        peer, other = self.ranks[op.peer], op.counterpart(rank)
        if other not in peer.offered:
            state.offered.add(op)
            return False
        for end, message in ((rank, op), (op.peer, other)):
            if message.kind.is_receive:
                self.ranks[end].received.add(message)
            self._pop(end, message)
        self.awake.append(op.peer)
        return True

    def _pop(self, rank: int, op: Operation) -> None:
        state = self.ranks[rank]
        index = state.index[op]
        next(queue for queue in state.queues.values() if queue and queue[0] == index).popleft()
