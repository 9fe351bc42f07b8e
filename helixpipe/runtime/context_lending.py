"""Keys and values on loan: what their messages add to the operations of a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Protocol

from helixpipe.plan.context import Context, ContextMessage
from helixpipe.plan.context_lifetime import Content, holdings
from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.segment_names import reads_context
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.transfers import Receive, Send, Source, Tensors

_Step = Callable[[], None]


class ContextLending(Protocol):
    """Keys and values of slices on one rank: its own that others read, and others' that it reads."""

    def layout(self, context: Context) -> MessageLayout:
        """Layout of the message of keys and values, and of that of their gradients."""

    def lend(self, context: Context) -> Tensors:
        """The keys and values to send, in the order of the layout."""

    def borrow(self, context: Context, tensors: Tensors) -> None:
        """Let readers find what a message has brought."""

    def drop(self, segment: int, micro_batches: Iterable[int]) -> None:
        """Let go of keys and values that nobody reads here any more, not of sums of their gradients."""

    def give_back(self, context: Context) -> Tensors:
        """The sums of gradients to send, after the last reader's backward."""

    def take_back(self, context: Context, gradients: Tensors) -> None:
        """Keep what a borrower has returned for the backwards that made the keys and values."""

    def with_returned(self, segment: int, micro_batch: int, gradients: Tensors) -> Tensors:
        """Gradients of what ``segment`` has made, with all that readers have added to keys and values."""

    def assert_empty(self) -> None:
        """Nothing is left of any slice."""


class _WithReturned:
    """The gradients that a backward starts from, with those that came home from later slices."""

    def __init__(self, source: Source, lending: ContextLending, operation: Operation) -> None:
        self._source = source
        self._lending = lending
        self._key = operation.segment, operation.micro_batch

    def take(self) -> Tensors:
        """See :class:`Source`."""
        return self._lending.with_returned(*self._key, self._source.take())


class ContextSteps:
    """Binds messages of contexts to the operations of one rank that make and read keys and values.

    Args:
        plan: whose slices read what other slices have made.
        rank: this one.
        lending: its keys and values.
        sends, receives: of all messages of this rank.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        lending: ContextLending,
        sends: Mapping[Operation, Send],
        receives: Mapping[Operation, Receive],
    ) -> None:
        self._plan = plan
        self._rank = rank
        self._lending = lending
        self._sends = sends
        self._receives = receives
        self._messages = {
            end: message
            for message in plan.context_index.producers
            for end in ((message.sender, message.send), (message.receiver, message.receive))
        }

    def layout(self, operation: Operation) -> MessageLayout:
        """Of a message of keys and values or of their gradients."""
        return self._lending.layout(self._messages[self._rank, operation].context)

    def send(self, operation: Operation) -> _Step:
        """What sends keys and values, or their gradients."""
        context = self._messages[self._rank, operation].context
        content = self._lending.give_back if operation.kind is Kind.SEND_D else self._lending.lend
        post = self._sends[operation].post
        return lambda: post(content(context))

    def source(self, operation: Operation, source: Source | None) -> Source | None:
        """The gradients for a backward: of one that made keys and values, with what readers have added."""
        names, segment = self._plan.segment_names, operation.segment
        makes = not reads_context(names[segment]) and reads_context(names[min(segment + 1, len(names) - 1)])
        if source is None or not makes:
            return source
        return _WithReturned(source, self._lending, operation)

    def bind(self, steps: dict[Operation, _Step]) -> None:
        """Before the first computation that needs a message take it, after the last let go of it."""
        for holding in holdings(self._plan, self._rank):
            if holding.content is Content.KEYS:
                drop = partial(self._lending.drop, holding.segment, holding.micro_batches)
                steps[holding.end] = _in_turn(steps[holding.end], drop)
        awaited: set[ContextMessage] = set()
        for operation in steps:
            for message in self._plan.context_index.needed_by.get(operation, ()):
                if message not in awaited:
                    awaited.add(message)
                    steps[operation] = _in_turn(self._taking(message), steps[operation])

    def _taking(self, message: ContextMessage) -> _Step:
        """Wait for a message and hand it on."""
        deliver = self._lending.take_back if message.receive.kind is Kind.RECV_D else self._lending.borrow
        receive, context = self._receives[message.receive], message.context
        return lambda: deliver(context, receive.take())


def _in_turn(first: _Step, second: _Step) -> _Step:
    def both() -> None:
        first()
        second()

    return both
