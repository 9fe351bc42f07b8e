"""Times and bytes of a device's work, and the surroundings that Megatron's modules need."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig

from helixpipe.megatron_adapter import cpu_backend
from helixpipe.runtime.trace import Clock, CudaClock, HostClock


def prepare(device: torch.device) -> None:
    """A process group of one rank, for Megatron."""
    if device.type == "cpu":
        cpu_backend.install()
    folder = tempfile.mkdtemp()
    dist.init_process_group("gloo", init_method=f"file://{Path(folder, 'store')}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def wrapped(config: TransformerConfig, module: torch.nn.Module) -> DistributedDataParallel:
    """For training as ``pretrain_gpt.py`` does it: gradients are summed up in fp32."""
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(config, ddp_config, module)


def clock_of(device: torch.device) -> Clock:
    """Events of a GPU, or the host's clock."""
    return CudaClock() if device.type == "cuda" else HostClock()


def percentiles(name: str, samples: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of milliseconds, as columns."""
    low, middle, high = numpy.percentile(samples, (20, 50, 80)).tolist()
    return {f"{name}_ms": middle, f"{name}_p20": low, f"{name}_p80": high}


def timed(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each of ``repeats`` calls, after three that are not measured."""
    clock = clock_of(device)
    for _ in range(3):
        function()
    marks = [clock.mark()]
    for _ in range(repeats):
        function()
        marks.append(clock.mark())
    return [clock.elapsed_ms(*pair) for pair in pairwise(marks)]


class MemoryMeter:
    """Bytes on the device; on a CPU the process's resident memory, of which there is only the peak."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def start(self) -> None:
        """Forget the peaks so far."""
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def held(self) -> int:
        """In tensors at this moment; 0 on a CPU."""
        return torch.cuda.memory_allocated() if self.on_gpu else 0

    def peaks(self) -> dict[str, int]:
        """Since the start, as columns: in tensors, and taken from the device."""
        if self.on_gpu:
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            return {"peak_bytes": allocated, "reserved_bytes": reserved}
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"peak_bytes": resident, "reserved_bytes": resident}


def now_s() -> float:
    """For time that is spent."""
    return time.monotonic()
