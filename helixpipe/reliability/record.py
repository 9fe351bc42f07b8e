"""What a rank is doing, in memory that it shares with its sentinel: a few numbers per operation."""

from __future__ import annotations

import mmap
import struct
import time
import zlib
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeAlias

RUNNING, WAITING, BETWEEN = 0, 1, 2

# Written per operation: the state, an operation (segment, kind, micro batch, peer), the operation completed
# last, and since when.
_OPERATION = struct.Struct("<B q8sqq q8sqq d")
# Written per phase: the iteration, the number of this place in the program, its name, the deadline.
_PHASE = struct.Struct("<qQ32sd")
_PULSE = struct.Struct("<d")
# Behind each of them: a reader on another core may see any part of it changed and any other not yet.
_CHECKSUM = struct.Struct("<I")
_PHASE_AT, _PULSE_AT = 256, 512
RECORD_BYTES = 1024


# A plan's operation, a named tuple: segment, kind, micro batch, pipeline rank of a message's other end.
OperationLike: TypeAlias = tuple[int, Enum, int, int | None]


class Numbers(NamedTuple):
    """An operation as it is read back."""

    segment: int
    kind: str
    micro_batch: int
    peer: int | None

    def __str__(self) -> str:
        text = f"{self.segment}{self.kind}{self.micro_batch}"
        return text if self.peer is None else f"{text}@{self.peer}"


class Record(NamedTuple):
    """One look at a rank's progress.

    Attributes:
        state: ``RUNNING`` the operation, ``WAITING`` for it (a message), or ``BETWEEN`` two.
        operation: see ``state``; None between two.
        last: completed last, None if none was.
        since: when this began, by the host's monotonic clock, in seconds.
        step: iteration, from 1; 0 before the first.
        place: grows with every phase and place of the program, in the same way on all ranks.
        phase: its name.
        deadline_s: how long any one operation or wait may take in this phase; infinite for no limit.
        pulse: when the interpreter last ran the rank's own listener.
    """

    state: int
    operation: Numbers | None
    last: Numbers | None
    since: float
    step: int
    place: int
    phase: str
    deadline_s: float
    pulse: float


# A rank writes for far less than a microsecond; after so many reads it has been stopped within.
_MAX_READS = 100
_NOTHING = (-1, b"", -1, -1)
_Packed = tuple[int, bytes, int, int]


class Progress(Protocol):
    """Told by whoever runs a plan what it is about to do."""

    def begin(self, operation: OperationLike) -> None:
        """An operation starts; the one before it has ended."""

    def wait(self, message: OperationLike) -> None:
        """The operation begun last cannot go on before this message has arrived, or was taken."""

    def resume(self) -> None:
        """The wait is over."""

    def end(self) -> None:
        """The operation begun last has ended and none follows at once."""


class NoProgress:
    """For runs that nobody watches."""

    def begin(self, operation: OperationLike) -> None:
        """See :class:`Progress`."""

    def wait(self, message: OperationLike) -> None:
        """See :class:`Progress`."""

    def resume(self) -> None:
        """See :class:`Progress`."""

    def end(self) -> None:
        """See :class:`Progress`."""


class SharedProgress:
    """Writes a record; the sentinel reads it with a :class:`RecordReader`.

    Args:
        memory: ``RECORD_BYTES`` bytes, zero at first.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._place = 0
        self._now = self._last = _NOTHING
        self._kinds: dict[Enum, bytes] = {}
        self._write(BETWEEN, _NOTHING)

    def begin(self, operation: OperationLike) -> None:
        """See :class:`Progress`."""
        if self._now is not _NOTHING:
            self._last = self._now
        self._now = self._packed(operation)
        self._write(RUNNING, self._now)

    def wait(self, message: OperationLike) -> None:
        """See :class:`Progress`."""
        self._write(WAITING, self._packed(message))

    def resume(self) -> None:
        """See :class:`Progress`."""
        self._write(BETWEEN if self._now is _NOTHING else RUNNING, self._now)

    def end(self) -> None:
        """See :class:`Progress`."""
        if self._now is not _NOTHING:
            self._last = self._now
        self._now = _NOTHING
        self._write(BETWEEN, _NOTHING)

    def enter(self, phase: str, step: int, deadline_s: float) -> None:
        """The program has reached its next phase or place."""
        self._place += 1
        _publish(self._memory, _PHASE_AT, _PHASE.pack(step, self._place, phase.encode()[:32], deadline_s))
        self.end()

    def pulse(self) -> None:
        """The interpreter runs; called from a thread of its own."""
        _publish(self._memory, _PULSE_AT, _PULSE.pack(time.monotonic()))

    def _packed(self, operation: OperationLike) -> _Packed:
        segment, kind, micro_batch, peer = operation
        name = self._kinds.get(kind)
        if name is None:
            name = self._kinds[kind] = kind.value.encode()
        return segment, name, micro_batch, -1 if peer is None else peer

    def _write(self, state: int, operation: _Packed) -> None:
        _publish(self._memory, 0, _OPERATION.pack(state, *operation, *self._last, time.monotonic()))


class RecordReader:
    """Reads what a rank writes meanwhile.

    Args:
        memory: that of its :class:`SharedProgress`.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        now = time.monotonic()
        self._seen: dict[int, tuple[Any, ...]] = {
            0: (BETWEEN, *_NOTHING, *_NOTHING, now),
            _PHASE_AT: (0, 0, b"", float("inf")),
            _PULSE_AT: (now,),
        }

    def read(self) -> Record:
        """The record; of what a rank was stopped in the middle of writing, what stood there before."""
        state, *numbers, since = self._whole(_OPERATION, 0)
        step, place, phase, deadline_s = self._whole(_PHASE, _PHASE_AT)
        (pulse,) = self._whole(_PULSE, _PULSE_AT)
        name = phase.rstrip(b"\0").decode(errors="replace")
        return Record(
            state, _numbers(*numbers[:4]), _numbers(*numbers[4:]), since, step, place, name, deadline_s, pulse
        )

    def _whole(self, layout: struct.Struct, at: int) -> tuple[Any, ...]:
        size = layout.size
        for _ in range(_MAX_READS):
            found = self._memory[at : at + size + _CHECKSUM.size]
            if _CHECKSUM.unpack_from(found, size)[0] == zlib.crc32(found[:size]):
                self._seen[at] = layout.unpack_from(found)
                break
        return self._seen[at]


def _publish(memory: mmap.mmap, at: int, packed: bytes) -> None:
    whole = packed + _CHECKSUM.pack(zlib.crc32(packed))
    memory[at : at + len(whole)] = whole


def _numbers(segment: int, kind: bytes, micro_batch: int, peer: int) -> Numbers | None:
    if segment < 0:
        return None
    return Numbers(segment, kind.rstrip(b"\0").decode(), micro_batch, None if peer < 0 else peer)
