"""A communicator that behaves like NCCL on GPUs, for ranks that are threads of one process.

What it shares with the real thing, and with no other transport of the tests:

* two ranks connect at their first message in each direction, and the host waits there for the peer's host;
* the host only enqueues: ``wait`` makes the compute stream wait and returns at once;
* every ordered pair has a stream, or every direction has one; streams share few hardware queues, and in a
  queue whatever waits holds up all that was enqueued after it, also that of other streams;
* a message moves when both ends have come to the head of their queues, and keeps its buffers until then.

Devices are as late as they can be: they work only when every host waits, one of them for its device. There is
no clock. When every host waits and no device can go on, all fail with the same report of who waits for what.

Only the data is early: a host that computes with a message gets it once its sender's host has sent it. Which
kernels are enqueued, and in which order, does not depend on that.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

Result = TypeVar("Result")
_COMPUTE = "compute"
_GIVE_UP_S = 30.0  # for tests that do not say when a host has ended


class Deadlock(TimeoutError):
    """No host and no device can go on."""


@dataclass(eq=False)
class _Kernel:
    """Something enqueued: runs when all it needs is done, and a message together with the peer's end."""

    rank: int
    what: str
    needs: list[_Kernel]
    message: tuple[int, int, int] | None = None  # sender, receiver, how many before it
    num_bytes: int = 0
    is_done: bool = False


@dataclass(frozen=True)
class _Wait:
    """What a host waits for: another host, or its device."""

    what: str
    condition: Callable[[], bool]
    on_device: bool


@dataclass
class _Host:
    streams: dict[str, int] = field(default_factory=dict)  # name -> number, in the order of first use
    queues: dict[int, deque[_Kernel]] = field(default_factory=lambda: defaultdict(deque))
    last: dict[str, _Kernel] = field(default_factory=dict)  # of each stream
    connected: set[tuple[int, int]] = field(default_factory=set)
    num_messages: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    waits_for: _Wait | None = None
    num_begun: int = 0
    has_ended: bool = False
    held_bytes: int = 0
    peak_bytes: int = 0
    buffers: dict[_Kernel, range] = field(default_factory=dict)  # addresses, of messages under way


class NcclLikeFabric:
    """The devices and hosts of all ranks.

    Args:
        size: number of ranks.
        num_queues: hardware queues of a device, to which its streams are dealt in turn.
        has_pair_streams: a stream for every ordered pair of ranks; else one per direction, as in a group with
            one communicator.
        connects_lazily: False: all ranks are connected from the start.
    """

    def __init__(
        self,
        size: int,
        *,
        num_queues: int = 1,
        has_pair_streams: bool = True,
        connects_lazily: bool = True,
    ) -> None:
        self.size = size
        self.num_queues = num_queues
        self.has_pair_streams = has_pair_streams
        self.connects_lazily = connects_lazily
        self._hosts = [_Host() for _ in range(size)]
        self._boxes: dict[tuple[int, int, int], Tensor] = {}
        self._ends: dict[tuple[int, tuple[int, int, int]], _Kernel] = {}
        self._changed = threading.Condition()
        self._verdict: str | None = None

    def communicator(self, rank: int) -> NcclLikeCommunicator:
        """The end of one rank."""
        return NcclLikeCommunicator(self, rank)

    def run(self, rank: int, function: Callable[[], Result]) -> Result:
        """Call ``function``, an iteration, as the host of ``rank``; then let its device end all."""
        with self._changed:
            self._hosts[rank].has_ended = False
            self._hosts[rank].num_begun += 1
        try:
            result = function()
            with self._changed:
                kernels = [kernel for queue in self._hosts[rank].queues.values() for kernel in queue]
                self.wait(
                    rank, "its device", lambda: all(kernel.is_done for kernel in kernels), on_device=True
                )
            return result
        finally:
            with self._changed:
                self._hosts[rank].has_ended = True
                self._changed.notify_all()

    def peak_bytes(self, rank: int) -> int:
        """Of the buffers of messages that the device had not ended, at most."""
        return self._hosts[rank].peak_bytes

    def assert_empty(self) -> None:
        """Nothing was left behind."""
        assert not self._boxes, f"messages (sender, receiver, number) never received: {sorted(self._boxes)}"
        assert not any(queue for host in self._hosts for queue in host.queues.values()), self._report()

    # What follows is called with the lock held.

    def enqueue(
        self,
        rank: int,
        stream: str,
        what: str,
        *needs: _Kernel,
        message: tuple[int, int, int] | None = None,
        num_bytes: int = 0,
    ) -> _Kernel:
        """Append to the stream's queue; it also needs what was on the stream before."""
        host = self._hosts[rank]
        before = [host.last[stream]] if stream in host.last else []
        kernel = _Kernel(rank, what, [*before, *needs], message, num_bytes)
        number = host.streams.setdefault(stream, len(host.streams))
        host.queues[number % self.num_queues].append(kernel)
        host.last[stream] = kernel
        host.held_bytes += num_bytes
        host.peak_bytes = max(host.peak_bytes, host.held_bytes)
        if message is not None:
            self._ends[rank, message] = kernel
        self._changed.notify_all()
        return kernel

    def start(self, rank: int, sender: int, receiver: int, what: str, buffer: Tensor) -> _Kernel:
        """Connect if need be, and enqueue one end of the next message from ``sender`` to ``receiver``."""
        host, pair = self._hosts[rank], (sender, receiver)
        host.connected.add(pair)
        self._changed.notify_all()
        if self.connects_lazily:
            (peer,) = set(pair) - {rank}
            self.wait(rank, f"rank {peer} to connect", lambda: pair in self._hosts[peer].connected)
        number = host.num_messages[pair]
        host.num_messages[pair] += 1
        direction = "up" if sender < receiver else "down"
        stream = f"{sender} to {receiver}" if self.has_pair_streams else direction
        # What was enqueued for computing so far may write or read the buffer.
        needs = [host.last[_COMPUTE]] if _COMPUTE in host.last else []
        message = (sender, receiver, number)
        kernel = self.enqueue(rank, stream, what, *needs, message=message, num_bytes=buffer.nbytes)
        self._use_buffer(host, kernel, buffer)
        return kernel

    def _use_buffer(self, host: _Host, kernel: _Kernel, buffer: Tensor) -> None:
        """Its memory, which was just written to, may be that of another message only if that one has ended.

        What has ended to the compute stream: it writes what is sent, and clears what is received into.
        """
        addresses = range(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes)
        for other, taken in host.buffers.items():
            overlaps = addresses.start < taken.stop and taken.start < addresses.stop
            if overlaps and not _follows(host.last.get(_COMPUTE), other):
                raise AssertionError(f"the buffer of {other.what} is used too early, for {kernel.what}")
        host.buffers[kernel] = addresses

    def put(self, kernel: _Kernel, data: Tensor) -> None:
        assert kernel.message is not None
        self._boxes[kernel.message] = data.clone()
        self._changed.notify_all()

    def take(self, rank: int, kernel: _Kernel) -> Tensor:
        assert kernel.message is not None
        message = kernel.message
        self.wait(rank, f"the data of {kernel.what}", lambda: message in self._boxes)
        return self._boxes.pop(message)

    def wait(self, rank: int, what: str, condition: Callable[[], bool], *, on_device: bool = False) -> None:
        """Let this host wait; raises :class:`Deadlock` once nobody can go on."""
        host = self._hosts[rank]
        host.waits_for = _Wait(what, condition, on_device)
        try:
            while not condition():
                if self._someone_can_go_on():
                    if not self._changed.wait(_GIVE_UP_S):
                        raise TimeoutError(self._report())
                    continue
                # Only now, and only if a host waits for one: devices are as late as can be.
                if (
                    any(other.waits_for and other.waits_for.on_device for other in self._hosts)
                    and self._work()
                ):
                    self._changed.notify_all()
                    continue
                self._verdict = self._verdict or self._report()
                self._changed.notify_all()
                raise Deadlock(self._verdict)
        finally:
            host.waits_for = None

    def _someone_can_go_on(self) -> bool:
        # A host that has not begun the others' iteration will.
        iteration = max(host.num_begun for host in self._hosts)
        return self._verdict is None and any(
            host.num_begun < iteration
            if host.has_ended
            else host.waits_for is None or host.waits_for.condition()
            for host in self._hosts
        )

    def _work(self) -> bool:
        """Let all devices do what they can; False if that is nothing."""
        has_worked = False
        again = True
        while again:
            again = False
            for host in self._hosts:
                for queue in host.queues.values():
                    while queue and self._end(queue[0]):
                        again = has_worked = True
        return has_worked

    def _end(self, kernel: _Kernel) -> bool:
        """Run the head of a queue, and the peer's end with it, if both can run."""
        ends = [kernel]
        if kernel.message is not None:
            (peer,) = set(kernel.message[:2]) - {kernel.rank}
            other = self._ends.get((peer, kernel.message))
            if other is None:
                return False
            ends.append(other)
        if not all(self._is_head(end) and all(need.is_done for need in end.needs) for end in ends):
            return False
        for end in ends:
            host = self._hosts[end.rank]
            next(queue for queue in host.queues.values() if queue and queue[0] is end).popleft()
            host.held_bytes -= end.num_bytes
            host.buffers.pop(end, None)
            end.is_done, end.needs = True, []
        return True

    def _is_head(self, kernel: _Kernel) -> bool:
        return any(queue and queue[0] is kernel for queue in self._hosts[kernel.rank].queues.values())

    def _report(self) -> str:
        return "nobody can go on:\n" + "\n".join(
            line for rank in range(self.size) for line in self._lines(rank)
        )

    def _lines(self, rank: int) -> Iterator[str]:
        host = self._hosts[rank]
        waits = "has ended" if host.has_ended else "runs" if host.waits_for is None else ""
        yield f"  rank {rank}: its host {waits or f'waits for {host.waits_for.what}'}"
        for number, queue in sorted(host.queues.items()):
            if queue:
                yield f"    queue {number} stands at {queue[0].what}, {len(queue) - 1} behind it"


def _follows(kernel: _Kernel | None, other: _Kernel) -> bool:
    """Whether ``kernel`` cannot begin before ``other`` has ended."""
    pending, seen = [kernel] if kernel else [], set()
    while pending:
        needed = pending.pop()
        if needed is other:
            return True
        if id(needed) not in seen:
            seen.add(id(needed))
            pending += needed.needs
    return False


class NcclLikeCommunicator:
    """One rank's end of an :class:`NcclLikeFabric`, and its device.

    Messages are matched by their order alone: tags are not sent.
    """

    def __init__(self, fabric: NcclLikeFabric, rank: int) -> None:
        self.fabric = fabric
        self.rank = rank
        self.size = fabric.size

    def record_event(self) -> _Event:
        """Enqueue a computation; the event at its end."""
        with self.fabric._changed:
            return _Event(self.fabric, self.fabric.enqueue(self.rank, _COMPUTE, "a computation"))

    def send(self, buffer: Tensor, peer: int, tag: int) -> _Send:
        with self.fabric._changed:
            kernel = self.fabric.start(self.rank, self.rank, peer, f"send {tag} to rank {peer}", buffer)
            self.fabric.put(kernel, buffer)
        return _Send(self.fabric, kernel, buffer)

    def receive(self, buffer: Tensor, peer: int, tag: int) -> _Receive:
        with self.fabric._changed:
            kernel = self.fabric.start(self.rank, peer, self.rank, f"receive {tag} from rank {peer}", buffer)
        return _Receive(self.fabric, kernel, buffer)


@dataclass
class _Handle:
    fabric: NcclLikeFabric
    kernel: _Kernel
    buffer: Tensor

    def is_completed(self) -> bool:
        with self.fabric._changed:
            return self.kernel.is_done

    def _let_compute_wait(self) -> None:
        self.fabric.enqueue(self.kernel.rank, _COMPUTE, f"a wait for {self.kernel.what}", self.kernel)


class _Send(_Handle):
    def wait(self) -> None:
        with self.fabric._changed:
            self._let_compute_wait()


class _Receive(_Handle):
    def wait(self) -> None:
        rank = self.kernel.rank
        with self.fabric._changed:
            self._let_compute_wait()
            data = self.fabric.take(rank, self.kernel)
        if data.shape != self.buffer.shape or data.dtype != self.buffer.dtype:
            raise ValueError(
                f"rank {rank} expected {tuple(self.buffer.shape)} {self.buffer.dtype} in {self.kernel.what}, "
                f"got {tuple(data.shape)} {data.dtype}"
            )
        self.buffer.copy_(data)


@dataclass
class _Event:
    fabric: NcclLikeFabric
    kernel: _Kernel

    def synchronize(self) -> None:
        with self.fabric._changed:
            rank = self.kernel.rank
            self.fabric.wait(rank, self.kernel.what, lambda: self.kernel.is_done, on_device=True)
