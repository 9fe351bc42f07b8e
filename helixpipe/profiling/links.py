"""The link between two pipeline ranks, and what the optimizer and the reduction of gradients take."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from helixpipe.plan.simulation.network import BYTES_PER_MS, Network
from helixpipe.runtime.communicator import TorchCommunicator
from helixpipe.runtime.gpu import barrier
from helixpipe.runtime.message import MessageLayout

_SMALL_BYTES = 1024
_ROUNDS = 10


def measure_network(
    communicator: TorchCommunicator, message_bytes: int, device: torch.device, tensor_parallel: int
) -> Network:
    """The link between ranks 0 and 1, and what it takes of their time; the other ranks wait.

    On a single rank, a copy stands in for the link.

    Args:
        communicator: over the pipeline ranks.
        message_bytes: size at which bandwidth is measured, on one GPU.
        device: where buffers live.
        tensor_parallel: GPUs of a pipeline rank, which send side by side.
    """
    small, large = (_one_way(communicator, size, device) for size in (_SMALL_BYTES, message_bytes))

    def gb_per_s(milliseconds: float) -> float:
        return message_bytes * tensor_parallel / max(milliseconds, 1e-6) / BYTES_PER_MS

    packing_ms = _packing_ms(message_bytes, device)
    # On a GPU the network card and copy engines carry the message; on a CPU, threads of the same cores do.
    carrying_ms = large.processor_ms if device.type == "cpu" and communicator.size > 1 else 0.0
    return Network(
        latency_ms=small.elapsed_ms,
        gb_per_s=gb_per_s(large.elapsed_ms - small.elapsed_ms),
        send_gb_per_s=gb_per_s(packing_ms + carrying_ms / 2),
        receive_gb_per_s=gb_per_s(carrying_ms / 2) if carrying_ms else 0.0,
    )


class _OneWay(NamedTuple):
    """Milliseconds of a message, and of the processor at both ends together."""

    elapsed_ms: float
    processor_ms: float


def _one_way(communicator: TorchCommunicator, num_bytes: int, device: torch.device) -> _OneWay:
    buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    other = torch.zeros_like(buffer)
    samples = []
    for number in range(_ROUNDS + 1):
        barrier()
        started, processor = time.perf_counter(), time.process_time()
        if communicator.size == 1:
            other.copy_(buffer)
        elif communicator.rank == 0:
            communicator.send(buffer, 1, 2 * number).wait()
            communicator.receive(other, 1, 2 * number + 1).wait()
        elif communicator.rank == 1:
            communicator.receive(other, 0, 2 * number).wait()
            communicator.send(buffer, 0, 2 * number + 1).wait()
        _synchronize()
        trips = 1 if communicator.size == 1 else 2
        # Each end of a message does its half: both halves of one trip are one rank's work on two.
        samples.append(
            _OneWay((time.perf_counter() - started) / trips * 1e3, (time.process_time() - processor) * 1e3)
        )
    # The first opens the connection.
    return sorted(samples[1:])[_ROUNDS // 2]


def _packing_ms(num_bytes: int, device: torch.device) -> float:
    """Milliseconds to pack two tensors into a message."""
    half = torch.zeros(num_bytes // 2, dtype=torch.uint8, device=device)
    layout = MessageLayout((half.shape, half.shape), half.dtype)
    samples = []
    for _ in range(_ROUNDS + 1):
        _synchronize()
        started = time.perf_counter()
        layout.empty(device).fill((half, half))
        _synchronize()
        samples.append(time.perf_counter() - started)
    return sorted(samples)[_ROUNDS // 2] * 1e3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
