"""Latency and bandwidth of each link that a plan uses, with its own size of message."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby

import torch
import torch.distributed as dist

from helixpipe.plan.simulation.network import BYTES_PER_MS
from helixpipe.preflight.checks import Link, Pair
from helixpipe.runtime.connections import connection_order

_DEFAULT_BYTES = 16 << 20
_FIRST_BYTES = 1 << 20
# Long enough to be measured, short enough for hundreds of links in a minute.
_MEASURED_S = 0.05
_PINGS = 10
_ROUNDS = 3

Measure = Callable[[int, int, int, torch.device], Link | None]


def measure_links(
    pairs: Iterable[Pair],
    num_bytes: Mapping[Pair, int],
    num_stages: int,
    device: torch.device,
    say: Callable[[str], None],
    measure: Measure | None = None,
) -> dict[Pair, Link]:
    """The links on which this rank sends; all ranks call it alike.

    Links that share no rank are measured at the same time, and so are those of all pipelines, as they work at
    the same time in training.

    Args:
        pairs: of stages between which there are messages, lower first.
        num_bytes: of one GPU's message by sending and receiving stage; 16 MiB where it is not known.
        num_stages: pipeline-parallel size.
        device: where messages are.
        say: told which link this rank measures, and nothing once it has.
        measure: stands in for :func:`measure_link`.

    Returns:
        By sender and receiver, ranks of the job.
    """
    measure = measure or measure_link
    rank, ranks_per_stage = dist.get_rank(), dist.get_world_size() // num_stages
    found: dict[Pair, Link] = {}
    # As connections are made: pairs that follow each other share no rank.
    for _, together in groupby(connection_order(set(pairs), num_stages), lambda pair: sum(pair) % num_stages):
        mine = [pair for pair in together if rank // ranks_per_stage in pair]
        for way in (1, -1):
            _meet(device)
            for first, second in mine:
                ends = (first, second) if way == 1 else (second, first)
                sender, receiver = (stage * ranks_per_stage + rank % ranks_per_stage for stage in ends)
                say(f"the link from rank {sender} to rank {receiver}")
                link = measure(sender, receiver, num_bytes.get(ends, _DEFAULT_BYTES), device)
                say("")
                if link is not None:
                    found[sender, receiver] = link
    return found


def measure_link(sender: int, receiver: int, num_bytes: int, device: torch.device) -> Link | None:
    """The link between two ranks; both call it, and the sender gets the answer.

    Args:
        sender, receiver: ranks of the job.
        num_bytes: of a message; fewer are sent where they would take long.
        device: where messages are.
    """
    here = dist.get_rank()
    word = torch.zeros(1, dtype=torch.int64, device=device)

    def trip(message: torch.Tensor) -> float:
        """Seconds from a message's start until a word has come back."""
        started = time.perf_counter()
        if here == sender:
            dist.send(message, receiver)
            dist.recv(word, receiver)
        else:
            dist.recv(message, sender)
            dist.send(word, sender)
        _wait_for_device(device)
        return time.perf_counter() - started

    trip(torch.zeros(1, dtype=torch.int64, device=device))  # opens the connection
    back_s = min(trip(word.clone()) for _ in range(_PINGS)) / 2
    first = torch.zeros(_FIRST_BYTES, dtype=torch.uint8, device=device)
    first_s = min(trip(first) for _ in range(2))
    # Both ends must know how much is sent.
    fitting = int(_FIRST_BYTES * _MEASURED_S / first_s)
    size = torch.tensor([max(_FIRST_BYTES, min(num_bytes, fitting))], device=device)
    trip(size)
    message = torch.zeros(int(size), dtype=torch.uint8, device=device)
    whole_s = min(trip(message) for _ in range(_ROUNDS))
    if here != sender:
        return None
    transfer_ms = max(whole_s - 2 * back_s, 1e-6) * 1e3
    return Link(latency_ms=back_s * 1e3, gb_per_s=message.numel() / transfer_ms / BYTES_PER_MS)


def _meet(device: torch.device) -> None:
    dist.all_reduce(torch.zeros(1, device=device))
    _wait_for_device(device)


def clock_readings(device: torch.device) -> list[float]:
    """This host's clock, in seconds, read a few times just after all ranks have met."""
    readings = []
    for _ in range(_ROUNDS):
        _meet(device)
        readings.append(time.time())
    return readings


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
