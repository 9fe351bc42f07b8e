"""What one rank tells about its host, before it has spoken to any other."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from helixpipe.reliability.versions import versions

# Matrices that keep a GPU busy for some milliseconds.
_MATRIX = 4096
_PRODUCTS = 10
_FLOPS_PER_TFLOP = 1e12


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One rank's host and device.

    Attributes:
        host: its name.
        versions: by the name to show.
        gpus: of the host, as torch sees them.
        ranks: of the job on this host.
        gpu: this rank's device; empty without one.
        gpu_total_bytes, gpu_free_bytes: of the device's memory.
        gpu_tflops: that bf16 products reach here.
        gpu_clock_mhz: of its cores right after them; 0 if the driver does not tell.
        scratch: the node-local folder for temporary files.
        scratch_bytes: free there.
        scratch_error: why nothing can be written there, empty if it can.
        job_error: why the job's arguments or files are refused here, empty if they are not.
        job_code: exit code of that error.
    """

    host: str
    versions: dict[str, str] = field(default_factory=dict)
    gpus: int = 0
    ranks: int = 1
    gpu: str = ""
    gpu_total_bytes: int = 0
    gpu_free_bytes: int = 0
    gpu_tflops: float = 0.0
    gpu_clock_mhz: int = 0
    scratch: str = ""
    scratch_bytes: int = 0
    scratch_error: str = ""
    job_error: str = ""
    job_code: int = 0


def gather_facts(host: str, ranks: int, job_error: str = "", job_code: int = 0) -> Facts:
    """Facts of this process, whose device is torch's current one.

    Args:
        host: its name; the system's own if empty.
        ranks: of the job on this host.
        job_error, job_code: as in :class:`Facts`.
    """
    scratch = tempfile.gettempdir()
    found = versions()
    device: dict[str, Any] = {}
    if torch.cuda.is_available():
        found["version of NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        device = _device_facts()
    return Facts(
        host=host or socket.gethostname(),
        versions=found,
        gpus=torch.cuda.device_count(),
        ranks=ranks,
        scratch=scratch,
        scratch_bytes=shutil.disk_usage(scratch).free,
        scratch_error=_why_not_writable(scratch),
        job_error=job_error,
        job_code=job_code,
        **device,
    )


def _device_facts() -> dict[str, Any]:
    # Before this process has taken any for itself.
    free, total = torch.cuda.mem_get_info()
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_total_bytes": total,
        "gpu_free_bytes": free,
        "gpu_tflops": _tflops(),
        "gpu_clock_mhz": _clock_mhz(),
    }


def _tflops() -> float:
    matrix = torch.ones(_MATRIX, _MATRIX, dtype=torch.bfloat16, device="cuda")
    for _ in range(_PRODUCTS):  # until the clocks are up
        matrix @ matrix
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(_PRODUCTS):
        matrix @ matrix
    torch.cuda.synchronize()
    return 2 * _MATRIX**3 * _PRODUCTS / (time.perf_counter() - started) / _FLOPS_PER_TFLOP


def _clock_mhz() -> int:
    try:
        return int(torch.cuda.clock_rate())
    except Exception:  # NVML's Python package, or its library, is not there, or refuses
        return 0


def _why_not_writable(folder: str) -> str:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"helixpipe")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""
