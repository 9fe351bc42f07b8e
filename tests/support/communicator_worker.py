"""What ranks say to each other in the communicator tests: the same words over every transport.

A scenario is called on each of four ranks with its communicator. Where only two talk, they are 0 and 1.
"""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helixpipe.runtime.communicator import Communicator, TorchCommunicator

SIZE = 4
GO = 9999  # tag of the messages by which one rank lets another go on


def message(*words: int, numel: int = 5) -> Tensor:
    """A tensor that no other words give."""
    generator = torch.Generator().manual_seed(sum(word * 1000**i for i, word in enumerate(words)))
    return torch.randn(numel, generator=generator)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def let_go(communicator: Communicator, peer: int) -> None:
    communicator.send(torch.zeros(1), peer, GO).wait()


def wait_for(communicator: Communicator, peer: int) -> None:
    communicator.receive(torch.zeros(1), peer, GO).wait()


def knows_rank_and_size(communicator: Communicator) -> None:
    assert communicator.size in (2, SIZE)
    assert 0 <= communicator.rank < communicator.size


def order_is_kept_under_one_tag(communicator: Communicator) -> None:
    if communicator.rank == 0:
        handles = [communicator.send(message(i), 1, 7) for i in range(20)]
        for handle in handles:
            handle.wait()
    elif communicator.rank == 1:
        buffers = [torch.empty(5) for _ in range(20)]
        handles = [communicator.receive(buffer, 0, 7) for buffer in buffers]
        for i, (handle, buffer) in enumerate(zip(handles, buffers, strict=True)):
            handle.wait()
            assert_same(buffer, message(i))


def tags_are_kept_apart(communicator: Communicator) -> None:
    """Two messages under each of ten tags, taken in another order than sent."""
    if communicator.rank == 0:
        handles = [communicator.send(message(tag, i), 1, tag) for i in range(2) for tag in range(10)]
        for handle in handles:
            handle.wait()
    elif communicator.rank == 1:
        buffers = {(tag, i): torch.empty(5) for tag in reversed(range(10)) for i in range(2)}
        handles = {key: communicator.receive(buffer, 0, key[0]) for key, buffer in buffers.items()}
        for key in sorted(handles, key=lambda key: (key[1], key[0] * 7 % 10)):
            handles[key].wait()
            assert_same(buffers[key], message(*key))


def receive_before_send(communicator: Communicator) -> None:
    if communicator.rank == 0:
        wait_for(communicator, 1)
        communicator.send(message(1), 1, 3).wait()
    elif communicator.rank == 1:
        buffer = torch.empty(5)
        handle = communicator.receive(buffer, 0, 3)
        let_go(communicator, 0)
        handle.wait()
        assert_same(buffer, message(1))


def send_before_receive(communicator: Communicator) -> None:
    if communicator.rank == 0:
        handle = communicator.send(message(1), 1, 3)
        let_go(communicator, 1)
        handle.wait()
    elif communicator.rank == 1:
        wait_for(communicator, 0)
        buffer = torch.empty(5)
        communicator.receive(buffer, 0, 3).wait()
        assert_same(buffer, message(1))


def both_directions_at_once(communicator: Communicator) -> None:
    """Large enough that neither fits into a socket: each must be read while the other is written."""
    if communicator.rank > 1:
        return
    peer, numel = 1 - communicator.rank, 1 << 20
    for turn in range(2):
        sent = communicator.send(message(communicator.rank, turn, numel=numel), peer, 5)
        buffer = torch.empty(numel)
        received = communicator.receive(buffer, peer, 5)
        sent.wait()
        received.wait()
        assert_same(buffer, message(peer, turn, numel=numel))


def everyone_to_everyone(communicator: Communicator) -> None:
    """Sizes differ by pair, so a message that goes astray cannot go unnoticed."""

    def size(sender: int, receiver: int) -> int:
        return 10 * sender + receiver + 1

    rank, peers = communicator.rank, [peer for peer in range(communicator.size) if peer != communicator.rank]
    buffers = {(peer, tag): torch.empty(size(peer, rank)) for peer in peers for tag in (0, 1)}
    handles = [communicator.receive(buffer, peer, tag) for (peer, tag), buffer in buffers.items()]
    handles += [
        communicator.send(message(rank, peer, tag, numel=size(rank, peer)), peer, tag)
        for tag in (1, 0)
        for peer in reversed(peers)
    ]
    for handle in handles:
        handle.wait()
    for (peer, tag), buffer in buffers.items():
        assert_same(buffer, message(peer, rank, tag, numel=size(peer, rank)))


def all_types_and_odd_sizes(communicator: Communicator) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64):
        for numel in (1, 127, 4097):
            expected = (100 * message(numel, numel=numel)).abs().to(dtype)
            if communicator.rank == 0:
                # A part of a larger tensor: contiguous, at an odd offset.
                whole = torch.cat([expected[:1], expected, expected[:1]])
                communicator.send(whole[1:-1], 1, 11).wait()
            elif communicator.rank == 1:
                whole = torch.full((numel + 2,), 3, dtype=dtype)
                communicator.receive(whole[1:-1], 0, 11).wait()
                assert_same(whole[1:-1], expected)
                assert whole[[0, -1]].tolist() == [3, 3]


def a_buffer_is_free_once_its_send_was_waited_for(communicator: Communicator) -> None:
    if communicator.rank == 0:
        buffer = message(1, numel=4097)
        communicator.send(buffer, 1, 2).wait()
        buffer.zero_()
        let_go(communicator, 1)
    elif communicator.rank == 1:
        buffer = torch.empty(4097)
        handle = communicator.receive(buffer, 0, 2)
        wait_for(communicator, 0)
        handle.wait()
        assert_same(buffer, message(1, numel=4097))


SCENARIOS: dict[str, Callable[[Communicator], None]] = {
    scenario.__name__: scenario
    for scenario in (
        knows_rank_and_size,
        order_is_kept_under_one_tag,
        tags_are_kept_apart,
        receive_before_send,
        send_before_receive,
        both_directions_at_once,
        everyone_to_everyone,
        all_types_and_odd_sizes,
        a_buffer_is_free_once_its_send_was_waited_for,
    )
}
GROUPS = ("gloo", "gloo with two groups", "gloo among ranks 1 and 3")


def run_all_over_gloo() -> dict[tuple[str, str], str | None]:
    """Every scenario over every arrangement of groups: None, or the traceback of this rank."""
    outcomes: dict[tuple[str, str], str | None] = {}
    for name, communicator in _communicators():
        for scenario, function in SCENARIOS.items():
            try:
                if communicator is not None:
                    function(communicator)
                outcomes[name, scenario] = None
            except Exception:
                outcomes[name, scenario] = traceback.format_exc()
    return outcomes


def _communicators() -> Iterator[tuple[str, Communicator | None]]:
    def group(*ranks: int) -> dist.ProcessGroup:
        # A message that never comes fails its scenario, not the whole run.
        return dist.new_group(ranks, timeout=datetime.timedelta(seconds=10))

    everyone = range(SIZE)
    one, upward, downward, some = group(*everyone), group(*everyone), group(*everyone), group(1, 3)
    yield GROUPS[0], TorchCommunicator(one)
    yield GROUPS[1], TorchCommunicator(upward, downward)
    yield GROUPS[2], TorchCommunicator(some) if dist.get_rank() in (1, 3) else None


def groups_of_messages() -> list[str]:
    """Which group each of a rank's messages uses, without sending any."""
    used: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def send(self, buffers: list[Tensor], peer: int, tag: int) -> None:
            used.append(f"send to {peer} {self.name}")

        def recv(self, buffers: list[Tensor], peer: int, tag: int) -> None:
            used.append(f"receive from {peer} {self.name}")

    upward, downward = dist.new_group(), dist.new_group()
    names = {upward: "upward", downward: "downward"}
    communicator: Any = TorchCommunicator(upward, downward)
    for way in ("_upward", "_downward"):
        setattr(communicator, way, Recorder(names[getattr(communicator, way)]))
    for peer in range(communicator.size):
        if peer != communicator.rank:
            communicator.send(torch.zeros(1), peer, 0)
            communicator.receive(torch.zeros(1), peer, 0)
    return used
