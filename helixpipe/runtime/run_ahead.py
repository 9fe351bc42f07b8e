"""How far a host may run ahead of its device.

On a GPU the host only enqueues, so without a bound it is at the end of an iteration when the device is at its
beginning: every message still holds its buffers, and where a device hangs nobody can tell.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from helixpipe.plan.operation import Operation
from helixpipe.reliability.record import Progress
from helixpipe.runtime.communicator import Handle

# The one that the device computes and the one that follows: the device never waits for the host.
RUN_AHEAD = 2


class DeviceEvent(Protocol):
    """A mark in the device's work."""

    def synchronize(self) -> object:
        """Return when the device has ended all work before the mark."""


class _Started(NamedTuple):
    """Work that the device may not have ended, and the messages that it waits for."""

    messages: tuple[tuple[Operation, Sequence[Handle]], ...]
    event: DeviceEvent

    @property
    def missing(self) -> Operation | None:
        """The first message that has not arrived."""
        return next(
            (op for op, handles in self.messages if not all(handle.is_completed() for handle in handles)),
            None,
        )


class RunAhead:
    """Lets the host wait for the device's oldest work.

    Args:
        most: compute operations that may be started and not ended.
        record_event: marks the present end of the device's work.
        release: called when the device has ended something, to give back what it needs no more.
        progress: told of the message that the device waits for.
    """

    def __init__(
        self,
        most: int,
        record_event: Callable[[], DeviceEvent],
        release: Callable[[], None],
        progress: Progress,
    ) -> None:
        self._most = most
        self._record_event = record_event
        self._release = release
        self._progress = progress
        self._awaited: list[tuple[Operation, Sequence[Handle]]] = []  # since the last mark
        self._started: deque[_Started] = deque()

    def await_message(self, receive: Operation, handles: Sequence[Handle]) -> None:
        """What is started next waits for a message."""
        self._awaited.append((receive, handles))

    def started(self) -> None:
        """A compute operation was enqueued; wait for the one that is too far back."""
        self._mark()
        self._wait(self._most)

    def finish(self) -> None:
        """Wait for all work."""
        self._mark()
        self._wait(0)

    def _mark(self) -> None:
        self._started.append(_Started(tuple(self._awaited), self._record_event()))
        self._awaited.clear()

    def _wait(self, most: int) -> None:
        while len(self._started) > most:
            oldest = self._started.popleft()
            missing = oldest.missing
            if missing is not None:
                self._progress.wait(missing)
            oldest.event.synchronize()
            if missing is not None:
                self._progress.resume()
            self._release()


def record_cuda_event() -> DeviceEvent:
    """An event on the current stream."""
    event = torch.cuda.Event()
    event.record()
    return event
