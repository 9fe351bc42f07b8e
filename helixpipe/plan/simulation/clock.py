"""The clock: when every computation of a plan starts and ends."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from helixpipe.plan.computations import NONE
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.costs import Costs, LoanBytes
from helixpipe.plan.simulation.network import Links, Route

_NEVER = float("inf")
# Sums of durations in another order may differ by as much.
_ROUNDING = 1 + 1e-9
# What an event is: a computation ends, weights on loan leave, keys and values leave once more.
_ENDS, _LENDS, _RESENDS = range(3)


class Wait(NamedTuple):
    """A time in which a rank stands still for a content, see :class:`helixpipe.plan.wiring.Wiring`."""

    content: int
    start_ms: float
    end_ms: float


class _Message(NamedTuple):
    """What every message of one edge needs.

    Attributes:
        sender: its rank.
        route: its links.
        send_ms, receive_ms: what the ranks at its ends spend on it.
    """

    sender: int
    route: Route
    send_ms: float = 0.0
    receive_ms: float = 0.0


class Clock:
    """Ends operations in the order of time, so that messages queue for links in the order they are ready.

    Attributes:
        starts_ms, ends_ms: of every computation, by number.
        waits: of every rank.
        returned_ms: of every rank, when the last gradients of weights that it has lent have come back.
    """

    def __init__(self, plan: Plan, costs: Costs, deadline_ms: float = _NEVER) -> None:
        """Make everything ready to run.

        Args:
            plan: a valid plan.
            costs: times by cost name.
            deadline_ms: by when all computations must have ended; none if left out.
        """
        work, wiring = plan.computations, plan.wiring
        num_computations = len(work.operations)
        self.starts_ms = [0.0] * num_computations
        self.ends_ms = [0.0] * num_computations
        self.waits: list[list[Wait]] = [[] for _ in plan.orders]
        self.returned_ms = [0.0] * plan.num_ranks

        self._wiring = wiring
        self._receivers = wiring.receivers
        # ``NONE`` stands for a content that is there from the start.
        self._inputs = work.inputs.tolist()
        durations = [
            costs.duration_ms(kind, name, splits_backward=splits) for kind, name, splits in work.classes
        ]
        self._durations_ms = [durations[place] for place in work.class_of.tolist()]
        self._latest_ms = self._latest_starts(work.begins, deadline_ms)
        self._is_late = False
        self._edge_of = work.edge_of.tolist()
        self._begins, self._last = work.begins[:-1], work.begins[1:]
        self._next = list(self._begins)
        self._free_ms = [0.0] * plan.num_ranks
        self._ended_ms = [-_NEVER] * plan.num_ranks  # what the rank has started last ends here
        # When the receiver of each content has it, and what it spends on the message first.
        self._arrival_ms = [*[_NEVER] * len(wiring.receivers), 0.0]
        self._receive_ms: dict[int, float] = {}
        self._blocked_by = [NONE] * plan.num_ranks
        self._woken: list[int] = []
        self._events: list[tuple[float, int, int, int]] = []  # time, rank, what, its number
        # (receiver, computations that end there first) -> contents whose receives are not posted
        self._unposted: dict[tuple[int, int], list[tuple[int, _Message]]] = defaultdict(list)
        self._makers_left = list(wiring.num_makers)
        self._set_messages(plan, costs)

    def _set_messages(self, plan: Plan, costs: Costs) -> None:
        """What the message of every edge, loan and context needs."""
        links = self._links = None if costs.network is None else Links(costs.network)
        self._lent: list[Route] = []
        self._returned: list[Route] = []
        if links is not None:
            for loan in self._wiring.loans:
                size = costs.loan_bytes.get(plan.segment_names[loan.segment], LoanBytes(0, 0))
                self._lent.append(links.route(size.weights, loan.owner, loan.borrower))
                self._returned.append(links.route(size.gradients, loan.borrower, loan.owner))
        self._messages = [
            _message(
                links,
                edge.sender,
                edge.receiver,
                costs.num_bytes(edge.producer, edge.consumer),
                costs.transfer_ms(edge.producer, edge.consumer),
            )
            for edge in plan.computations.edges
        ]
        self._of_contexts = []
        for context in self._wiring.contexts:
            names = [plan.context_cost_name(i) for i in context.context.lent]
            sizes = sum(map(costs.context_message_bytes, names)), sum(map(costs.context_ms, names))
            self._of_contexts.append(_message(links, context.sender, context.receiver, *sizes))
        self._parts_left = [len(loan.micro_batches) for loan in self._wiring.loans]
        network = costs.network
        # Ranks spend time on messages.
        self._has_ends = network is not None and max(network.send_gb_per_s, network.receive_gb_per_s) > 0

    def _latest_starts(self, begins: Sequence[int], deadline_ms: float) -> list[float]:
        """When each computation must start at the latest, for its rank's work to end by the deadline."""
        if deadline_ms == _NEVER:
            return [_NEVER] * len(self._durations_ms)
        found: list[float] = []
        for begin, end in pairwise(begins):
            left_ms = np.cumsum(self._durations_ms[begin:end][::-1])[::-1]
            found += (deadline_ms * _ROUNDING - left_ms).tolist()
        return found

    def run(self) -> bool:
        """Start and end all computations, or stop as soon as they cannot end by the deadline: False then.

        Raises:
            ValueError: some wait for ever.
        """
        for rank in range(len(self._next)):
            self._start(rank)
        events, woken = self._events, self._woken
        while events:
            if self._is_late:
                return False
            now_ms, rank, what, number = heapq.heappop(events)
            if what == _ENDS:
                self._end(rank, number, now_ms)
                self._start(rank)
            elif what == _LENDS:
                self._lend(number, now_ms)
            else:
                self._leave(self._wiring.first_context + number, self._of_contexts[number], now_ms)
            while woken:
                self._start(woken.pop(0))
        if any(number < last for number, last in zip(self._next, self._last, strict=True)):
            raise ValueError("the plan deadlocks; validate it first")
        return not self._is_late

    def _start(self, rank: int) -> None:
        """Start the rank's next computation if it has all that it needs."""
        number = self._next[rank]
        if number == self._last[rank]:
            return
        start_ms, waited_for, wiring = self._free_ms[rank], NONE, self._wiring
        for content in wiring.with_loans.get(number) or (self._inputs[number],):
            arrival_ms = self._arrival_ms[content]
            if arrival_ms == _NEVER:
                self._blocked_by[rank] = content
                return
            if arrival_ms > start_ms:
                start_ms, waited_for = arrival_ms, content
        if waited_for != NONE:
            self.waits[rank].append(Wait(waited_for, self._free_ms[rank], start_ms))
        if self._has_ends:
            start_ms += sum(self._receive_ms.pop(content, 0.0) for content in wiring.needs(number))
        if start_ms > self._latest_ms[number]:
            self._is_late = True
        end_ms = start_ms + self._durations_ms[number]
        self.starts_ms[number], self.ends_ms[number] = start_ms, end_ms
        self._free_ms[rank] = self._ended_ms[rank] = end_ms
        self._next[rank] = number + 1
        for place in wiring.lent_at.get(number, ()):
            heapq.heappush(self._events, (start_ms, wiring.loans[place].owner, _LENDS, place))
        for place in wiring.resent_at.get(number, ()):
            heapq.heappush(self._events, (start_ms, wiring.contexts[place].sender, _RESENDS, place))
        heapq.heappush(self._events, (end_ms, rank, _ENDS, number))

    def _end(self, rank: int, number: int, now_ms: float) -> None:
        """Send what a computation that has ended gives rise to."""
        if self._unposted:
            self._post(rank, now_ms)
        edge = self._edge_of[number]
        if edge != NONE:
            self._leave(number, self._messages[edge], now_ms)
        else:
            self._arrival_ms[number] = now_ms
        wiring = self._wiring
        for place in wiring.after.get(number, ()):
            self._makers_left[place] -= 1
            if self._makers_left[place] == 0:
                self._leave(wiring.first_context + place, self._of_contexts[place], now_ms)
        loan = wiring.returning.get(number)
        if loan is not None and self._links is not None:
            self._parts_left[loan] -= 1
            if self._parts_left[loan] == 0:
                owner = wiring.loans[loan].owner
                arrival_ms = self._links.send(self._returned[loan], now_ms)
                self.returned_ms[owner] = max(self.returned_ms[owner], arrival_ms)

    def _lend(self, loan: int, now_ms: float) -> None:
        """Send the weights of a loan."""
        arrival_ms = now_ms if self._links is None else self._links.send(self._lent[loan], now_ms)
        self._arrive(self._wiring.first_loan + loan, arrival_ms)

    def _leave(self, content: int, message: _Message, now_ms: float) -> None:
        """Send a message, or keep it until its receive is posted."""
        start_ms = now_ms
        if self._has_ends:
            self._free_ms[message.sender] += message.send_ms
            if self._ended_ms[message.sender] <= now_ms:
                # Between computations a rank handles messages, until it is free.
                start_ms = max(now_ms, self._free_ms[message.sender])
        posted_after = self._wiring.posted_after
        if posted_after is not None:
            receiver, count = self._receivers[content], posted_after[content]
            if not self._has_ended(receiver, count, start_ms):
                self._unposted[receiver, count].append((content, message))
                return
        self._transfer(content, message, start_ms)

    def _has_ended(self, rank: int, count: int, now_ms: float) -> bool:
        """True if so many computations of a rank end by now, even if the last one's event is to come."""
        last = self._begins[rank] + count - 1
        return count == 0 or (self._next[rank] > last and self.ends_ms[last] <= now_ms)

    def _post(self, rank: int, now_ms: float) -> None:
        """Let messages leave whose receives follow the computation that has just ended on ``rank``."""
        for content, message in self._unposted.pop((rank, self._next[rank] - self._begins[rank]), ()):
            self._transfer(content, message, now_ms)

    def _transfer(self, content: int, message: _Message, start_ms: float) -> None:
        if self._links is None:
            self._arrive(content, start_ms + message.route.total_ms)
            return
        if self._has_ends:
            self._receive_ms[content] = message.receive_ms
        self._arrive(content, self._links.send(message.route, start_ms))

    def _arrive(self, content: int, arrival_ms: float) -> None:
        """The receiver has a content, or will have it; wake it if it waits for that."""
        self._arrival_ms[content] = arrival_ms
        receiver = self._receivers[content]
        if self._blocked_by[receiver] == content:
            self._blocked_by[receiver] = NONE
            self._woken.append(receiver)


def _message(
    links: Links | None, sender: int, receiver: int, num_bytes: int, milliseconds: float
) -> _Message:
    if links is None:
        return _Message(sender, Route(milliseconds))
    network = links.network
    route = links.route(num_bytes, sender, receiver)
    return _Message(sender, route, network.send_ms(num_bytes), network.receive_ms(num_bytes))
