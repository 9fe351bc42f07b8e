"""A communicator that counts the bytes of messages under way, and plans that run over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from threads import run_on_threads
from torch import Tensor
from toy_segments import make_executor

from helixpipe.plan import Operation, Plan
from helixpipe.runtime.communicator import Communicator, Handle, InMemoryFabric
from helixpipe.runtime.message import HEADER_WORDS


class Counting:
    """A communicator whose messages end when they are waited for, and the bytes of those that have not."""

    def __init__(self, inner: Communicator) -> None:
        self.inner, self.rank, self.size = inner, inner.rank, inner.size
        self.bytes = 0

    def send(self, buffer: Tensor, peer: int, tag: int) -> Counted:
        return Counted(self, self.inner.send(buffer, peer, tag), buffer)

    def receive(self, buffer: Tensor, peer: int, tag: int) -> Counted:
        return Counted(self, self.inner.receive(buffer, peer, tag), buffer)


class Counted:
    def __init__(self, communicator: Counting, handle: Handle, buffer: Tensor) -> None:
        self.communicator, self.handle = communicator, handle
        self.payload = buffer.nbytes - 8 * HEADER_WORDS
        communicator.bytes += self.payload

    def wait(self) -> None:
        self.handle.wait()
        self.communicator.bytes -= self.payload

    def is_completed(self) -> bool:
        return False


def held_while_running(plan: Plan, make_segments: Callable[[], Any]) -> list[list[int]]:
    """Bytes that each rank's communicator holds as each of its compute operations runs."""
    fabric = InMemoryFabric(plan.num_ranks)

    def run(rank: int) -> list[int]:
        communicator, levels = Counting(fabric.communicator(rank)), []
        segments = make_segments()
        forward = segments.forward

        def look_and_run(*arguments: Any) -> Any:
            levels.append(communicator.bytes)
            return forward(*arguments)

        @contextmanager
        def look(operation: Operation) -> Iterator[None]:
            levels.append(communicator.bytes)
            yield

        segments.forward = look_and_run
        make_executor(plan, segments, communicator, backward_context=look).run()
        assert communicator.bytes == 0
        return levels

    return run_on_threads(plan.num_ranks, run)
