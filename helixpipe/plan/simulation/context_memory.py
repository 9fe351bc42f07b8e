"""Liveness of keys and values: what slices of a sequence hold for each other beside their activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from helixpipe.plan.context import Context
from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.segment_names import reads_context
from helixpipe.plan.simulation.costs import Costs

_Changes = tuple[Counter[Operation], Counter[Operation]]


def context_changes(plan: Plan, costs: Costs, rank: int) -> _Changes:
    """Bytes that a rank takes as each operation starts, and drops as it ends.

    * A context's keys and values live from RECV_K to the last reader's B; where they are lent again, to the
      last reader's F, and from RECV_KB on. Their gradients live from the first reader's B to SEND_D, and at
      the owner from RECV_D to the B that takes them.
    * A rank that makes keys and values in a segment of their own keeps those that it reads itself, or lends
      again, to the last B that reads them here, or the last SEND_KB. Their gradients live from the first B
      that reads them here to the B that takes them.
    * Where a rank runs the reading segment for several slices, the keys and values are among what its
      forwards keep; their gradients live from the last slice's B to their own.

    In a plan without messages, the first and the last computation that needs them stand for them.
    """
    return _Ledger(plan, costs, rank).changes()


class _Ledger:
    def __init__(self, plan: Plan, costs: Costs, rank: int) -> None:
        self.plan = plan
        self.costs = costs
        self.rank = rank
        self.place = {op: place for place, op in enumerate(plan.orders[rank])}
        self.taken: Counter[Operation] = Counter()
        self.dropped: Counter[Operation] = Counter()

    def changes(self) -> _Changes:
        for context in self.plan.contexts:
            if context.borrower == self.rank:
                self._borrow(context)
            if context.owner == self.rank and self.plan.has_backward:
                self._take_gradients(context)
        for segment, name in enumerate(self.plan.segment_names):
            if reads_context(name):
                for group in self.plan.slices:
                    self._read_own(segment, group)
        return self.taken, self.dropped

    def _borrow(self, context: Context) -> None:
        keys = sum(self._key_bytes(context.segment, i) for i in context.lent)
        gradients = sum(self._gradient_bytes(context.segment, i) for i in context.lent)
        forwards, backwards = context.reading(Kind.F), context.reading(Kind.B)
        arrival = self._first(context.keys_received, forwards)
        if not self.plan.has_backward:
            self._hold(keys, arrival, self._last(forwards))
            return
        if context.is_resent:
            self._hold(keys, arrival, self._last(forwards))
            arrival = self._first(context.keys_received_again, backwards)
        self._hold(keys, arrival, self._last(backwards))
        end = context.gradients_sent if context.gradients_sent in self.place else self._last(backwards)
        self._hold(gradients, min(backwards, key=self.place.__getitem__), end)

    def _take_gradients(self, context: Context) -> None:
        for i in context.lent:
            end = Operation(context.segment - 1, Kind.B, i)
            size = self._gradient_bytes(context.segment, i)
            self._hold(size, self._first(context.gradients_received, [end]), end)

    def _read_own(self, segment: int, group: tuple[int, ...]) -> None:
        """Of slices whose keys and values are on this rank without a message."""
        here = [i for i in group if self.plan.rank_of(segment, i) == self.rank]
        made = [i for i in group if segment and self.plan.rank_of(segment - 1, i) == self.rank]
        if self.plan.has_backward and here:
            first = Operation(segment, Kind.B, here[-1])
            for i in here[:-1]:
                self._hold(self._gradient_bytes(segment, i), first, Operation(segment, Kind.B, i))
        if not segment or reads_context(self.plan.segment_names[segment - 1]):
            return
        for i in made:
            if i not in here:
                self._keep(segment, i, [j for j in here if j > i])

    def _keep(self, segment: int, made: int, readers: list[int]) -> None:
        """Keys and values that this rank has made and sent away with their slice."""
        start = Operation(segment - 1, Kind.F, made)
        size = self._key_bytes(segment, made)
        kind = Kind.B if self.plan.has_backward else Kind.F
        ends = [Operation(segment, kind, j) for j in readers]
        if self.plan.has_backward:
            ends += self._resent(segment, made)
            if readers:
                end = Operation(segment - 1, Kind.B, made)
                first = Operation(segment, Kind.B, readers[-1])
                self._hold(self._gradient_bytes(segment, made), first, end)
        if ends:
            self._hold(size, start, self._last(ends))

    def _resent(self, segment: int, made: int) -> list[Operation]:
        """Where this rank lends keys and values again."""
        return [
            context.keys_resent
            for context in self.plan.contexts
            if context.is_resent
            and context.segment == segment
            and context.owner == self.rank
            and made in context.lent
            and context.keys_resent in self.place
        ]

    def _hold(self, size: int, start: Operation, end: Operation) -> None:
        self.taken[start] += size
        self.dropped[end] += size

    def _first(self, message: Operation, operations: Iterable[Operation]) -> Operation:
        """A message, or in a plan without it the first of the computations that need it."""
        return message if message in self.place else min(operations, key=self.place.__getitem__)

    def _last(self, operations: Iterable[Operation]) -> Operation:
        return max(operations, key=self.place.__getitem__)

    def _key_bytes(self, segment: int, i: int) -> int:
        return self.costs.segments[self.plan.cost_name(segment, i)].context_bytes

    def _gradient_bytes(self, segment: int, i: int) -> int:
        return self.costs.segments[self.plan.cost_name(segment, i)].gradient_bytes
