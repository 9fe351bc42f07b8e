"""Buffers of messages that are used again, by messages of the same layout.

A buffer is given back when the host has done with it, which on a GPU is before the device has. Nothing waits
for that: what is enqueued next on the current stream, and a message that is started next, follow in the order
of that stream all that was computed with the buffer before, and every message that was waited for. The
allocator would take it back later, for it asks the streams of messages from the host.
"""

from __future__ import annotations

import torch

from helixpipe.runtime.message import MessageBuffer, MessageLayout


class BufferPool:
    """Buffers that nobody uses, by layout.

    Attributes:
        max_bytes: so much may be idle. Larger messages are left to the allocator: beside what is computed
            with them, it costs nothing.
        max_bytes_between: so much may be idle between iterations, when others need the memory.
        bytes: that are idle.
    """

    max_bytes = 256 * 2**20
    max_bytes_between = 16 * 2**20

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._shelves: dict[MessageLayout, Shelf] = {}

    def shelf(self, layout: MessageLayout) -> Shelf:
        """The buffers of a layout."""
        return self._shelves.setdefault(layout, Shelf(self, layout))

    def trim(self) -> None:
        """Leave no more idle than may be between iterations."""
        for shelf in self._shelves.values():
            while shelf.idle and self.bytes > self.max_bytes_between:
                self.bytes -= shelf.layout.num_bytes
                shelf.idle.pop()


class Shelf:
    """The buffers of one layout in a pool.

    Attributes:
        layout: of all of them.
        idle: the last one given back is at the end, and taken first: caches may still hold it.
    """

    __slots__ = ("_num_bytes", "_pool", "idle", "layout")

    def __init__(self, pool: BufferPool, layout: MessageLayout) -> None:
        self.layout = layout
        self.idle: list[MessageBuffer] = []
        self._pool = pool
        self._num_bytes = layout.num_bytes

    def take(self) -> MessageBuffer:
        """A buffer with any content."""
        if not self.idle:
            return self.layout.empty(self._pool.device)
        self._pool.bytes -= self._num_bytes
        return self.idle.pop()

    def give(self, buffer: MessageBuffer) -> None:
        """Give back a buffer that the host has done with; one that others still refer to is theirs."""
        if self._pool.bytes + self._num_bytes <= self._pool.max_bytes and buffer.is_unused:
            self._pool.bytes += self._num_bytes
            self.idle.append(buffer)
