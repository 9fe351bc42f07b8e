"""Contexts: keys and values of a sequence's earlier slices that another rank's attention reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from helixpipe.plan.operation import Kind, Operation


class Context(NamedTuple):
    """Keys and values of slices, lent by the rank that makes them to one that attends to them.

    ``owner`` has made the keys and values of the micro batches ``lent`` in the segment before ``segment``;
    ``borrower`` runs ``segment`` of the ``readers``, later slices of the same sequence. They travel once,
    together, and the sum of their gradients returns once, after the last reader's B. The B that made them
    adds what has come home to the gradients that it is given.

    Attributes:
        segment: the segment that reads, attention.
        owner: rank that makes the keys and values, and takes their gradients.
        borrower: rank of the readers.
        lent: micro batches whose keys and values are lent, in ascending order.
        readers: micro batches that read them, in ascending order.
        is_resent: the borrower drops them after the last reader's F, and they are lent again for the
            backward pass.
    """

    segment: int
    owner: int
    borrower: int
    lent: tuple[int, ...]
    readers: tuple[int, ...]
    is_resent: bool = False

    @property
    def keys_sent(self) -> Operation:
        """The owner's end of the message of keys and values."""
        return Operation(self.segment, Kind.SEND_K, self.lent[0], self.borrower)

    @property
    def keys_received(self) -> Operation:
        """The borrower's end of the message of keys and values."""
        return self.keys_sent.counterpart(self.owner)

    @property
    def keys_resent(self) -> Operation:
        """The owner's end of the message that brings them again."""
        return Operation(self.segment, Kind.SEND_KB, self.lent[0], self.borrower)

    @property
    def keys_received_again(self) -> Operation:
        """The borrower's end of the message that brings them again."""
        return self.keys_resent.counterpart(self.owner)

    @property
    def gradients_sent(self) -> Operation:
        """The borrower's end of the message of gradients."""
        return Operation(self.segment, Kind.SEND_D, self.lent[0], self.owner)

    @property
    def gradients_received(self) -> Operation:
        """The owner's end of the message of gradients."""
        return self.gradients_sent.counterpart(self.borrower)

    def making(self, kind: Kind) -> set[Operation]:
        """The F that make the keys and values, or the B that take their gradients."""
        return {Operation(self.segment - 1, kind, i) for i in self.lent}

    def reading(self, kind: Kind) -> set[Operation]:
        """The F or B of the readers."""
        return {Operation(self.segment, kind, i) for i in self.readers}

    @property
    def before_resending(self) -> Operation:
        """The B that feeds the first reader of the backward pass: as it starts, the keys and values leave."""
        return Operation(self.segment + 1, Kind.B, self.readers[-1])


class ContextMessage(NamedTuple):
    """A message of a context, by its two ends."""

    context: Context
    sender: int
    send: Operation
    receiver: int
    receive: Operation


class ContextIndex:
    """The messages of contexts by the computations that they wait for and that wait for them.

    Args:
        contexts: of one plan.
        has_backward: False for evaluation plans, in which nothing returns.
    """

    def __init__(self, contexts: Iterable[Context], *, has_backward: bool) -> None:
        self.after: dict[Operation, list[ContextMessage]] = defaultdict(list)
        self.at_start_of: dict[Operation, list[ContextMessage]] = defaultdict(list)
        self.needed_by: dict[Operation, list[ContextMessage]] = defaultdict(list)
        self.producers: dict[ContextMessage, set[Operation]] = {}
        # The nearest slot first, in either direction: its reader is the first to need them.
        for context in sorted(contexts, key=lambda context: (context.segment, context.readers)):
            self._add_keys(context, has_backward=has_backward)
        if has_backward:
            for context in sorted(
                contexts, key=lambda context: (context.segment, context.lent), reverse=True
            ):
                self._add_gradients(context)

    def _add_keys(self, context: Context, *, has_backward: bool) -> None:
        ends = context.owner, context.keys_sent, context.borrower, context.keys_received
        keys = ContextMessage(context, *ends)
        self._add(keys, context.making(Kind.F), context.reading(Kind.F))
        if context.is_resent and has_backward:
            again = keys._replace(send=context.keys_resent, receive=context.keys_received_again)
            self.producers[again] = context.making(Kind.F)
            self.at_start_of[context.before_resending].append(again)
            self._need(again, context.reading(Kind.B))

    def _add_gradients(self, context: Context) -> None:
        ends = context.borrower, context.gradients_sent, context.owner, context.gradients_received
        message = ContextMessage(context, *ends)
        self._add(message, context.reading(Kind.B), context.making(Kind.B))

    def _add(self, message: ContextMessage, producers: set[Operation], consumers: set[Operation]) -> None:
        self.producers[message] = producers
        for operation in producers:
            self.after[operation].append(message)
        self._need(message, consumers)

    def _need(self, message: ContextMessage, consumers: set[Operation]) -> None:
        for operation in consumers:
            self.needed_by[operation].append(message)


class ContextProgress:
    """Which messages of contexts leave as the computations of a plan start and end.

    Args:
        index: of the plan.
    """

    def __init__(self, index: ContextIndex) -> None:
        self.index = index
        self._left = {message: len(producers) for message, producers in index.producers.items()}

    def started(self, operation: Operation) -> list[ContextMessage]:
        """The messages that leave as ``operation`` starts."""
        return self.index.at_start_of.get(operation, [])

    def ended(self, operation: Operation) -> list[ContextMessage]:
        """The messages that leave as ``operation`` ends: it is the last that they wait for."""
        leaving = []
        for message in self.index.after.get(operation, ()):
            self._left[message] -= 1
            if self._left[message] == 0:
                leaving.append(message)
        return leaving
