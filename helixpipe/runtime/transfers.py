"""How tensors pass from one operation to the next: within a rank, or as messages between two.

Everything here is bound once per plan: peer, tag, layout and header of a message do not change between
iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from helixpipe.plan.operation import Operation
from helixpipe.plan.simulation.message_buffers import UnfinishedSends
from helixpipe.reliability.record import Progress
from helixpipe.runtime.buffer_pool import BufferPool, Shelf
from helixpipe.runtime.communicator import Communicator, Handle
from helixpipe.runtime.header import HeaderCheck, Message
from helixpipe.runtime.message import MessageBuffer
from helixpipe.runtime.run_ahead import RunAhead
from helixpipe.runtime.trace import Trace

Tensors: TypeAlias = tuple[Tensor, ...]


class Source(Protocol):
    """Where an operation finds its input."""

    def take(self) -> Tensors:
        """The tensors, which are given once."""


class Slot:
    """What an operation leaves for the next one on its rank, which may be the one that sends it."""

    __slots__ = ("_tensors",)

    def __init__(self) -> None:
        self._tensors: Tensors | None = None

    def put(self, tensors: Tensors) -> None:
        """Leave the result."""
        assert self._tensors is None
        self._tensors = tensors

    def take(self) -> Tensors:
        """See :class:`Source`."""
        tensors, self._tensors = self._tensors, None
        assert tensors is not None, "its producer has not run"
        return tensors

    @property
    def is_empty(self) -> bool:
        """True if nothing waits to be taken."""
        return self._tensors is None


class Part(NamedTuple):
    """One buffer of a message, bound to all that is the same in every iteration.

    Attributes:
        number: in the messages' headers.
        peer: rank at the other end.
        tag: of the communicator.
        shelf: where buffers of its layout are.
    """

    number: int
    peer: int
    tag: int
    shelf: Shelf


class _Sent(NamedTuple):
    """A buffer under way, which must not change before its handle was waited for."""

    handle: Handle
    shelf: Shelf
    buffer: MessageBuffer


class Mail:
    """One rank's messages of a plan, with all that sending and receiving them needs.

    A message may be several buffers, as a layout is split; each is a message to the communicator.

    Args:
        communicator: this rank's end.
        plan_digest: of the plan that all ranks follow.
        messages: every buffer of this rank, in any order.
        device: where buffers are.
        trace, progress: told of waits.

    Attributes:
        run_ahead: where the host only enqueues, told of what the device waits for; else None.
    """

    def __init__(
        self,
        communicator: Communicator,
        plan_digest: int,
        messages: Sequence[Message],
        device: torch.device,
        trace: Trace,
        progress: Progress,
    ) -> None:
        self.communicator = communicator
        self.device = device
        self.trace = trace
        self.progress = progress
        self.headers = HeaderCheck(plan_digest, messages, device)
        self.numbers = {message.tag: number for number, message in enumerate(messages)}
        self.unfinished: UnfinishedSends[tuple[Operation, list[_Sent]]] = UnfinishedSends()
        self.pool = BufferPool(device)
        self.run_ahead: RunAhead | None = None

    def parts(self, messages: Sequence[Message]) -> tuple[Part, ...]:
        """The buffers of a message."""
        found = []
        for message in messages:
            peer = message.operation.peer
            assert peer is not None
            shelf = self.pool.shelf(message.layout)
            found.append(Part(self.numbers[message.tag], peer, message.tag, shelf))
        return tuple(found)

    def send(self, part: Part, tensors: Sequence[Tensor]) -> _Sent:
        """Start sending the tensors of one buffer."""
        shelf = part.shelf
        shelf.layout.check(tensors)
        buffer = shelf.take()
        buffer.fill(tensors)
        self.headers.write(part.number, buffer)
        return _Sent(self.communicator.send(buffer.data, part.peer, part.tag), shelf, buffer)

    def bound(self, operation: Operation, sent: list[_Sent], num_bytes: int) -> None:
        """Note what has been sent, and wait for the oldest if too much is unfinished."""
        self.unfinished.add(num_bytes, (operation, sent))
        while self.unfinished.are_too_many:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        """Wait for a send; on a GPU the current stream waits, so whatever is written next follows it."""
        operation, sent = self.unfinished.oldest
        self.progress.wait(operation)
        for part in sent:
            part.handle.wait()
        self.progress.resume()
        self._reuse_oldest()

    def release(self) -> None:
        """Take back the buffers of sends that have ended."""
        while self.unfinished and all(part.handle.is_completed() for part in self.unfinished.oldest[1]):
            self._reuse_oldest()

    def _reuse_oldest(self) -> None:
        _, sent = self.unfinished.take_oldest()
        for part in sent:
            part.shelf.give(part.buffer)

    def finish(self) -> None:
        """Wait for all sends, at the end of an iteration."""
        while self.unfinished:
            self._finish_oldest()
        self.pool.trim()


class Receive:
    """A message to this rank: posted in the plan's order, waited for by the operation that needs it.

    Attributes:
        gives_back: True if somebody calls :meth:`give_back` when the tensors are needed no more.
    """

    __slots__ = ("_incoming", "_mail", "_parts", "_taken", "gives_back", "operation")

    def __init__(self, mail: Mail, operation: Operation, messages: Sequence[Message]) -> None:
        self.operation = operation
        self.gives_back = False
        self._mail = mail
        self._parts = mail.parts(messages)
        self._incoming: list[tuple[Part, Handle, MessageBuffer]] = []
        self._taken: list[tuple[Shelf, MessageBuffer]] = []

    @property
    def is_posted(self) -> bool:
        """True from the post until the message is taken."""
        return bool(self._incoming)

    def post(self) -> None:
        """Begin to receive."""
        mail = self._mail
        for part in self._parts:
            buffer = part.shelf.take()
            mail.headers.clear(buffer)
            handle = mail.communicator.receive(buffer.data, part.peer, part.tag)
            self._incoming.append((part, handle, buffer))

    def take(self) -> Tensors:
        """See :class:`Source`; waits for the message."""
        mail, incoming = self._mail, self._incoming
        assert incoming, f"{self.operation} was not posted"
        mail.progress.wait(self.operation)
        start = mail.trace.clock.mark()
        for _, handle, _ in incoming:
            handle.wait()
        mail.trace.waited(self.operation, start)
        mail.progress.resume()
        if mail.run_ahead is not None:
            mail.run_ahead.await_message(self.operation, [handle for _, handle, _ in incoming])
        self._incoming = []
        tensors: Tensors = ()
        for part, _, buffer in incoming:
            mail.headers.compare(part.number, buffer)
            tensors += buffer.views()
            if self.gives_back:
                self._taken.append((part.shelf, buffer))
        return tensors

    def give_back(self, first: int = 0) -> None:
        """The tensors are needed no more, from those of buffer ``first`` on."""
        for shelf, buffer in self._taken[first:]:
            shelf.give(buffer)
        del self._taken[first:]


class Send:
    """A message from this rank."""

    __slots__ = ("_mail", "_num_bytes", "_parts", "operation")

    def __init__(self, mail: Mail, operation: Operation, messages: Sequence[Message]) -> None:
        self.operation = operation
        self._mail = mail
        self._parts = mail.parts(messages)
        self._num_bytes = sum(
            message.layout.num_elements * message.layout.dtype.itemsize for message in messages
        )

    def post(self, tensors: Tensors) -> None:
        """Begin to send the tensors of all its buffers."""
        first, sent = 0, []
        for part in self._parts:
            last = first + len(part.shelf.layout.shapes)
            sent.append(self._mail.send(part, tensors[first:last]))
            first = last
        assert first == len(tensors)
        self._mail.bound(self.operation, sent, self._num_bytes)
