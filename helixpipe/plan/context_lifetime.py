"""How long keys and values of slices, and gradients of them, are held beside a rank's activations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import NamedTuple

from helixpipe.plan.context import Context
from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.segment_names import reads_context


class Content(Enum):
    """What is held of slices."""

    KEYS = "keys and values"
    SUMS = "sums of their gradients, over the slices that read them"
    RETURNED = "their gradients in the message that brings them home"


class Holding(NamedTuple):
    """Something that a rank holds of slices from one operation to another.

    Attributes:
        content: what it is.
        segment: the segment that reads the keys and values.
        micro_batches: of which slices they are.
        start: the operation that takes the memory.
        end: the operation after which it is free.
    """

    content: Content
    segment: int
    micro_batches: tuple[int, ...]
    start: Operation
    end: Operation


def holdings(plan: Plan, rank: int) -> Iterator[Holding]:
    """What ``rank`` holds of slices.

    * A context's keys and values live from RECV_K to the last reader's B; where they are lent again, to the
      last reader's F, and from RECV_KB on. Sums of their gradients live from the first reader's B to SEND_D,
      and at the owner the message lives from RECV_D to the last B that takes of it.
    * A rank that makes keys and values in a segment of their own keeps those that it reads itself to the last
      B that reads them here, and those that it lends to the last SEND_K or SEND_KB. Sums of their gradients
      live from the first B that reads them here to the B that takes them.
    * Where a rank runs the reading segment for several slices, the keys and values are among what its
      forwards keep, and live beyond the slice's own B to a SEND_KB that comes later; sums of their gradients
      live from the last slice's B to their own.

    In a plan without messages, the first and the last computation that needs them stand for them.

    Args:
        plan: with slices.
        rank: a pipeline rank.
    """
    return _Holdings(plan, rank).all()


class _Holdings:
    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan = plan
        self.rank = rank
        self.place = {op: place for place, op in enumerate(plan.orders[rank])}
        # Where this rank lends the keys and values of a slice, by segment and slice.
        self.lent: dict[tuple[int, int], list[Operation]] = defaultdict(list)
        for context in plan.contexts:
            if context.owner == rank:
                ends = [end for end in (context.keys_sent, context.keys_resent) if end in self.place]
                for i in context.lent:
                    self.lent[context.segment, i] += ends

    def all(self) -> Iterator[Holding]:
        for context in self.plan.contexts:
            if context.borrower == self.rank:
                yield from self._borrowed(context)
            if context.owner == self.rank and self.plan.has_backward:
                takers = context.making(Kind.B)
                start = self._first(context.gradients_received, takers)
                yield Holding(Content.RETURNED, context.segment, context.lent, start, self._last(takers))
        for segment, name in enumerate(self.plan.segment_names):
            if reads_context(name):
                for group in self.plan.slices:
                    yield from self._own(segment, group)

    def _borrowed(self, context: Context) -> Iterator[Holding]:
        segment, lent = context.segment, context.lent
        forwards, backwards = context.reading(Kind.F), context.reading(Kind.B)
        arrival = self._first(context.keys_received, forwards)
        if not self.plan.has_backward:
            yield Holding(Content.KEYS, segment, lent, arrival, self._last(forwards))
            return
        if context.is_resent:
            yield Holding(Content.KEYS, segment, lent, arrival, self._last(forwards))
            arrival = self._first(context.keys_received_again, backwards)
        yield Holding(Content.KEYS, segment, lent, arrival, self._last(backwards))
        end = context.gradients_sent if context.gradients_sent in self.place else self._last(backwards)
        first = min(backwards, key=self.place.__getitem__)
        yield Holding(Content.SUMS, segment, lent, first, end)

    def _own(self, segment: int, group: tuple[int, ...]) -> Iterator[Holding]:
        """Of slices whose keys and values are on this rank without a message."""
        here = [i for i in group if self.plan.rank_of(segment, i) == self.rank]
        # Nobody reads the last slice's; where that micro batch begins another sequence, it is among that's.
        made = [i for i in group[:-1] if segment and self.plan.rank_of(segment - 1, i) == self.rank]
        if self.plan.has_backward and here:
            first = Operation(segment, Kind.B, here[-1])
            for i in here[:-1]:
                yield Holding(Content.SUMS, segment, (i,), first, Operation(segment, Kind.B, i))
        if not segment or reads_context(self.plan.segment_names[segment - 1]):
            return
        for i in made:
            if i in here:
                yield from self._lent_late(segment, i)
            else:
                yield from self._made(segment, i, [j for j in here if j > i])

    def _made(self, segment: int, made: int, readers: list[int]) -> Iterator[Holding]:
        """Of a slice whose keys and values this rank has made and sent away with it."""
        kind = Kind.B if self.plan.has_backward else Kind.F
        ends = [Operation(segment, kind, j) for j in readers] + self.lent[segment, made]
        if ends:
            start = Operation(segment - 1, Kind.F, made)
            yield Holding(Content.KEYS, segment, (made,), start, self._last(ends))
        if self.plan.has_backward and readers:
            first, taker = Operation(segment, Kind.B, readers[-1]), Operation(segment - 1, Kind.B, made)
            yield Holding(Content.SUMS, segment, (made,), first, taker)

    def _lent_late(self, segment: int, made: int) -> Iterator[Holding]:
        """Of a slice that attends here, too, and is lent when nothing else keeps its keys and values."""
        own = Operation(segment, Kind.B if self.plan.has_backward else Kind.F, made)
        last = max(self.lent[segment, made], key=self.place.__getitem__, default=own)
        if self.place[last] > self.place[own]:
            yield Holding(Content.KEYS, segment, (made,), own, last)

    def _first(self, message: Operation, operations: Iterable[Operation]) -> Operation:
        """A message, or in a plan without it the first of the computations that need it."""
        return message if message in self.place else min(operations, key=self.place.__getitem__)

    def _last(self, operations: Iterable[Operation]) -> Operation:
        return max(operations, key=self.place.__getitem__)
