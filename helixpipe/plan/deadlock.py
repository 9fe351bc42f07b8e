"""Deadlock detection under two models of sending."""

from __future__ import annotations

from collections import deque

from helixpipe.plan.operation import Operation, input_of
from helixpipe.plan.plan import Plan


def find_deadlock(plan: Plan, *, rendezvous: bool) -> dict[int, int]:
    """Run the plan without clocks; which operation each blocked rank is stuck at.

    Args:
        plan: lowered or compute-only; a compute-only plan is held to its data dependencies.
        rendezvous: True: a send blocks its rank until the peer stands at the matching receive, as
            blocking NCCL calls on one stream do. False: sends return at once, as with buffers.

    Returns:
        rank -> index into its order for every rank that cannot finish; empty if all finish.
    """
    return _Run(plan, rendezvous).stuck()


class _Run:
    def __init__(self, plan: Plan, rendezvous: bool) -> None:
        self.plan = plan
        self.rendezvous = rendezvous
        self.position = [0] * plan.num_ranks
        self.done: set[Operation] = set()
        self.in_flight: set[tuple[int, Operation]] = set()  # (receiver, its receive)
        self.waiting: dict[Operation, list[int]] = {}  # result -> ranks that wait for it
        self.ready = deque(range(plan.num_ranks))

    def stuck(self) -> dict[int, int]:
        while self.ready:
            rank = self.ready.popleft()
            while self._step(rank):
                pass
        return {
            rank: position
            for rank, position in enumerate(self.position)
            if position < len(self.plan.orders[rank])
        }

    def _current(self, rank: int) -> Operation | None:
        order, position = self.plan.orders[rank], self.position[rank]
        return order[position] if position < len(order) else None

    def _step(self, rank: int) -> bool:
        """Advance ``rank`` by one operation if it can."""
        op = self._current(rank)
        if op is None:
            return False
        if op.kind.is_compute:
            return self._compute(rank, op)
        assert op.peer is not None
        if op.kind.is_send and not self.rendezvous:
            self.in_flight.add((op.peer, op.counterpart(rank)))
            self.ready.append(op.peer)
        elif op.kind.is_receive and not self.rendezvous:
            if (rank, op) not in self.in_flight:
                return False
            self.in_flight.remove((rank, op))
        else:
            # Both ends meet: the one that arrives last moves both.
            if self._current(op.peer) != op.counterpart(rank):
                return False
            self.position[op.peer] += 1
            self.ready.append(op.peer)
        self.position[rank] += 1
        return True

    def _compute(self, rank: int, op: Operation) -> bool:
        # In a lowered plan a receive has already waited for inputs from other ranks.
        needed = input_of(op, self.plan.num_segments)
        producers = [] if needed is None else [needed]
        for message in self.plan.context_index.needed_by.get(op, ()):
            producers += self.plan.context_index.producers[message]
        for producer in producers:
            if producer not in self.done:
                self.waiting.setdefault(producer, []).append(rank)
                return False
        self.done.add(op)
        self.position[rank] += 1
        self.ready.extend(self.waiting.pop(op, ()))
        return True
