"""The trace: which operations a rank really ran, and when."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from helixpipe.plan.operation import Operation
from helixpipe.plan.simulation.timeline import Span


class Clock(Protocol):
    """Marks instants cheaply and converts them to milliseconds afterwards."""

    def mark(self) -> object:
        """The present instant of the device's work."""

    def elapsed_ms(self, start: object, end: object) -> float:
        """Milliseconds between two marks; may wait for the device."""


class HostClock:
    """The host's monotonic clock: right where operations run on the CPU."""

    def mark(self) -> object:
        """See :class:`Clock`."""
        return time.perf_counter()

    def elapsed_ms(self, start: object, end: object) -> float:
        """See :class:`Clock`."""
        assert isinstance(start, float)
        assert isinstance(end, float)
        return (end - start) * 1e3


class CudaClock:
    """Events on the current stream: they time the device without stopping it."""

    def mark(self) -> object:
        """See :class:`Clock`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start: object, end: object) -> float:
        """See :class:`Clock`."""
        assert isinstance(start, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        elapsed: float = start.elapsed_time(end)
        return elapsed


class NullClock:
    """Times nothing, for jobs that do not ask for measurements."""

    def mark(self) -> object:
        """See :class:`Clock`."""
        return None

    def elapsed_ms(self, start: object, end: object) -> float:
        """See :class:`Clock`."""
        return 0.0


_Mark = tuple[Operation, object, object]


class Trace:
    """Records one iteration on one rank.

    Args:
        clock: times the operations.
        sees_waits: False where whoever runs the operations does not tell what compute waits for; no
            recorded wait then means nothing.

    Attributes:
        operations: everything that was executed, messages included, in order.
    """

    def __init__(self, clock: Clock, *, sees_waits: bool = True) -> None:
        self.clock = clock
        self.sees_waits = sees_waits
        self.operations: list[Operation] = []
        self._origin: object = None
        self._end: object = None
        self._open: tuple[Operation, object] | None = None
        self._marks: list[_Mark] = []
        self._wait_marks: list[_Mark] = []

    def start(self) -> None:
        """Begin an iteration: forget the last one."""
        self.operations.clear()
        self._marks.clear()
        self._wait_marks.clear()
        self._open = self._end = None
        self._origin = self.clock.mark()

    def begin(self, operation: Operation) -> None:
        """One compute operation starts."""
        self._open = (operation, self.clock.mark())

    @property
    def current(self) -> Operation | None:
        """The compute operation that has begun and not ended, perhaps because of an error."""
        return None if self._open is None else self._open[0]

    def end(self) -> None:
        """The operation begun last has ended."""
        assert self._open is not None
        self._marks.append((*self._open, self.clock.mark()))
        self._open = None

    def waited(self, receive: Operation, start: object) -> None:
        """Compute stood still for a message since ``start``; next to nothing if it was there already."""
        self._wait_marks.append((receive, start, self.clock.mark()))

    def stop(self) -> None:
        """End the iteration."""
        self._end = self.clock.mark()

    def spans(self) -> tuple[Span, ...]:
        """The compute operations in milliseconds since :meth:`start`."""
        return self._spans(self._marks)

    def waits(self) -> tuple[Span, ...]:
        """The receives, and how long each kept compute waiting, in milliseconds since :meth:`start`."""
        return self._spans(self._wait_marks)

    def _spans(self, marks: list[_Mark]) -> tuple[Span, ...]:
        elapsed = self.clock.elapsed_ms
        return tuple(
            Span(op, elapsed(self._origin, start), elapsed(self._origin, end)) for op, start, end in marks
        )

    def total_ms(self) -> float:
        """Length of the iteration."""
        return self.clock.elapsed_ms(self._origin, self._end)

    def busy_ms(self) -> float:
        """Time in compute."""
        return sum(self.clock.elapsed_ms(start, end) for _, start, end in self._marks)


def default_clock() -> Clock:
    """Events where a GPU is used, else the host's clock."""
    return CudaClock() if torch.cuda.is_available() else HostClock()
