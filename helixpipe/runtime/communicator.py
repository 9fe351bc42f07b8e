"""Point-to-point messages between pipeline ranks: one interface, in memory or over torch.distributed."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Handle(Protocol):
    """A message under way."""

    def wait(self) -> object:
        """Return when the buffer may be read (receive) or reused (send).

        On CUDA the current stream waits, not the host.
        """

    def is_completed(self) -> bool:
        """True once the message has been sent or received; never waits, and may be late to tell."""


class Communicator(Protocol):
    """Messages of bytes between ``size`` ranks; between two ranks they keep their order."""

    rank: int
    size: int

    def send(self, buffer: Tensor, peer: int, tag: int) -> Handle:
        """Start sending a contiguous buffer, which must not change until the handle was waited for."""

    def receive(self, buffer: Tensor, peer: int, tag: int) -> Handle:
        """Start receiving into a contiguous buffer of the exact size that ``peer`` sends."""


class InMemoryFabric:
    """Mailboxes for ranks that are threads of one process; for tests.

    Args:
        size: number of ranks.
        timeout_s: how long a receive waits for its message before it raises ``TimeoutError``.
    """

    def __init__(self, size: int, timeout_s: float = 30.0) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self._arrived = threading.Condition()
        self._boxes: dict[tuple[int, int, int], deque[Tensor]] = defaultdict(deque)

    def communicator(self, rank: int) -> InMemoryCommunicator:
        """The end of one rank."""
        return InMemoryCommunicator(self, rank)

    def put(self, key: tuple[int, int, int], message: Tensor) -> None:
        """Deliver a copy to (sender, receiver, tag)."""
        with self._arrived:
            self._boxes[key].append(message.clone())
            self._arrived.notify_all()

    def take(self, key: tuple[int, int, int]) -> Tensor:
        """Wait for a message of (sender, receiver, tag)."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: self._boxes[key], self.timeout_s):
                sender, receiver, tag = key
                raise TimeoutError(f"rank {receiver} waited {self.timeout_s} s for {tag=} from rank {sender}")
            return self._boxes[key].popleft()

    def assert_empty(self) -> None:
        """No message was left behind."""
        left = {key: len(box) for key, box in self._boxes.items() if box}
        assert not left, f"messages (sender, receiver, tag) never received: {left}"


class InMemoryCommunicator:
    """One rank's end of an :class:`InMemoryFabric`."""

    def __init__(self, fabric: InMemoryFabric, rank: int) -> None:
        self.fabric = fabric
        self.rank = rank
        self.size = fabric.size

    def send(self, buffer: Tensor, peer: int, tag: int) -> Handle:
        """See :class:`Communicator`."""
        self.fabric.put((self.rank, peer, tag), buffer)
        return _Done()

    def receive(self, buffer: Tensor, peer: int, tag: int) -> Handle:
        """See :class:`Communicator`."""
        return _MailboxReceive(self.fabric, (peer, self.rank, tag), buffer)


class _Done:
    def wait(self) -> None:
        pass

    def is_completed(self) -> bool:
        return True


class _MailboxReceive:
    def __init__(self, fabric: InMemoryFabric, key: tuple[int, int, int], buffer: Tensor) -> None:
        self.fabric, self.key, self.buffer = fabric, key, buffer

    def wait(self) -> None:
        message = self.fabric.take(self.key)
        if message.shape != self.buffer.shape or message.dtype != self.buffer.dtype:
            raise ValueError(
                f"rank {self.key[1]} expected {tuple(self.buffer.shape)} {self.buffer.dtype} from rank "
                f"{self.key[0]}, got {tuple(message.shape)} {message.dtype}"
            )
        self.buffer.copy_(message)

    def is_completed(self) -> bool:
        return False  # the message is taken by whoever waits for it


class TorchCommunicator:
    """Messages over torch.distributed (gloo or NCCL).

    NCCL runs all messages between two ranks of a group one after the other, so a send posted early could
    stand before the receive that the peer needs first. With one group for messages to higher ranks and
    one for messages to lower ranks, every ordered pair has a stream of its own, in which both ends post
    in the plan's order. What streams hold up beyond that, a valid plan allows for. gloo matches messages by
    tag and needs one group.

    Args:
        group: the pipeline-parallel group.
        reverse_group: a second group of the same ranks for messages to lower ranks; None uses ``group``.
    """

    def __init__(self, group: dist.ProcessGroup, reverse_group: dist.ProcessGroup | None = None) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._upward = group
        self._downward = group if reverse_group is None else reverse_group

    def send(self, buffer: Tensor, peer: int, tag: int) -> Handle:
        """See :class:`Communicator`."""
        # The group's own call: dist.isend looks up per message what is known here.
        group = self._upward if peer > self.rank else self._downward
        return group.send([buffer], peer, tag)

    def receive(self, buffer: Tensor, peer: int, tag: int) -> Handle:
        """See :class:`Communicator`."""
        group = self._upward if peer < self.rank else self._downward
        return group.recv([buffer], peer, tag)
