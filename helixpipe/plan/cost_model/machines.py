"""Machines by name, each rate with its source, and machines from files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from helixpipe.json_input import read_json
from helixpipe.plan.cost_model.hardware import AttentionKernel, Hardware

# Sources.
#
# Peaks, memory and NVLink: NVIDIA's data sheets (A800 and H800: A100 and H100 with 400 GB/s NVLink both
# directions together; H20: 148 TFLOPS, 4.0 TB/s, 900 GB/s). Memory in GiB is what torch reports.
#
# Matrix products, bf16, as a share of the peak: A100 0.80 and H100 0.70, the latter limited by power
# (CUTLASS's published profiles for products of size 8192); H20 0.92, far from its power limit. For one
# shape, briefly, an H100 reaches 0.80 and a B200 0.78 (maximum achievable matmul flops,
# github.com/stas00/ml-engineering, compute/accelerator); lasting products of a B200, of which none are
# published, are put as far below that as an H100's: 0.68. The same source has fp8 products at 0.71 of an
# H100's fp8 peak and at 0.76 of a B200's, which makes 0.62 and 0.67 last. H20 again 0.92.
#
# Attention on H100. FlashAttention-3 (arXiv 2407.08608, figures 5 and 6, causal, head 128): 292, 423, 521,
# 579, 602, 616 TFLOPS forward from 512 to 16k tokens, which is 0.64 of the peak with half of it at 450
# tokens; 561 backward without a mask, less 6% for the mask, which it costs cuDNN: 0.54. FlashAttention-2 in
# the same figures: 191 to 335 forward, and 343 forward and 323 backward at 64k (cudnn-frontend,
# benchmark/benchmark_results.csv, H200): 0.35 and 0.33, half at 300. cuDNN 9.1 there: 567 and 504: 0.58 and
# 0.51, half at 400 (its curve in the figures).
#
# Attention on B200 and GB200 (cudnn-frontend, benchmark/sdpa_benchmark_training/artifacts, causal, head
# 128, 512 to 128k): cuDNN 9.13 on B200 1355 to 1419 forward and 1048 to 1109 backward from 32k on; cuDNN
# 9.17 on GB200 1467 to 1681 and 1188 to 1348, of which the figures at 64k are taken; FlashAttention-2 441
# and 349, 444 and 363.
#
# Attention on A100: FlashAttention-2 0.73 forward, 0.63 backward (arXiv 2307.08691, section 4.1). On H20,
# for which nothing is published: the same SMs as H100's with a seventh of the matrix rate, so that softmax
# and loads hide behind products: FlashAttention-3 0.85 and 0.75, as far below its matrix products as A100's
# are; cuDNN below it as on H100; FlashAttention-2 as on A100. Losses of short kernels are left out there: a
# kernel lasts seven times as long as an H100's.
#
# Memory: 0.85 of the peak for streaming kernels (BabelStream on A100 and H100 reaches 0.85 to 0.93). Links:
# 0.8 for large NCCL messages (nccl-tests' bus bandwidth over the link's peak, both NVLink and InfiniBand).
# Latencies: 10 and 20 microseconds for a message through NCCL's proxy. Network cards: 400 Gb/s each on
# H100, H200, H800 and Blackwell (DGX), 200 Gb/s on A100, A800 and H20 clusters.
#
# Multiprocessors: 78 on H20, 132 on H100, H200 and H800, 108 on A100 and A800, 148 on B200, 152 on GB200.
_HOPPER = (
    AttentionKernel("flash-attn-3", 0.64, 0.54, 450),
    AttentionKernel("cudnn", 0.58, 0.51, 400),
    AttentionKernel("flash-attn-2", 0.35, 0.33, 300),
)
_H20 = (
    AttentionKernel("flash-attn-3", 0.85, 0.75),
    AttentionKernel("cudnn", 0.77, 0.71),
    AttentionKernel("flash-attn-2", 0.73, 0.63),
)
_AMPERE = (AttentionKernel("flash-attn-2", 0.73, 0.63),)
_B200 = (AttentionKernel("cudnn", 0.61, 0.47, 1400), AttentionKernel("flash-attn-2", 0.20, 0.155, 1200))
_GB200 = (AttentionKernel("cudnn", 0.63, 0.49, 900), AttentionKernel("flash-attn-2", 0.18, 0.145, 700))


def _machine(kernels: tuple[AttentionKernel, ...], **rates: Any) -> Hardware:
    """Hardware with the fastest of its attention kernels."""
    fastest = kernels[0]
    return Hardware(
        attention_forward_efficiency=fastest.forward,
        attention_backward_efficiency=fastest.backward,
        attention_half_length=fastest.half_length,
        attention_kernels=kernels,
        **rates,
    )


_H100_PRODUCTS: dict[str, Any] = {
    "tflops": 989,
    "matmul_efficiency": 0.70,
    "fp8_tflops": 1979,
    "fp8_matmul_efficiency": 0.62,
    "idle_last_wave": 0.5,
}
_A100_RATES: dict[str, Any] = {
    "tflops": 312,
    "matmul_efficiency": 0.80,
    "memory_gib": 79.1,
    "memory_gb_per_s": 2039,
    "nic_gb_per_s": 25,
    "multiprocessors": 108,
}
HARDWARE: Mapping[str, Hardware] = {
    machine.name: machine
    for machine in (
        _machine(
            _H20,
            name="h20",
            tflops=148,
            matmul_efficiency=0.92,
            fp8_tflops=296,
            fp8_matmul_efficiency=0.92,
            memory_gib=95.0,
            memory_gb_per_s=4000,
            nvlink_gb_per_s=450,
            nic_gb_per_s=25,
            multiprocessors=78,
        ),
        _machine(
            _HOPPER,
            name="h100",
            **_H100_PRODUCTS,
            memory_gib=79.1,
            memory_gb_per_s=3350,
            nvlink_gb_per_s=450,
            nic_gb_per_s=50,
        ),
        _machine(
            _HOPPER,
            name="h200",
            **_H100_PRODUCTS,
            memory_gib=139.8,
            memory_gb_per_s=4800,
            nvlink_gb_per_s=450,
            nic_gb_per_s=50,
        ),
        _machine(
            _HOPPER,
            name="h800",
            **_H100_PRODUCTS,
            memory_gib=79.1,
            memory_gb_per_s=3350,
            nvlink_gb_per_s=200,
            nic_gb_per_s=50,
        ),
        _machine(_AMPERE, name="a100", **_A100_RATES, nvlink_gb_per_s=300),
        _machine(_AMPERE, name="a800", **_A100_RATES, nvlink_gb_per_s=200),
        _machine(
            _B200,
            name="b200",
            tflops=2250,
            matmul_efficiency=0.68,
            fp8_tflops=4500,
            fp8_matmul_efficiency=0.67,
            idle_last_wave=0.5,
            multiprocessors=148,
            memory_gib=178.4,
            memory_gb_per_s=8000,
            nvlink_gb_per_s=900,
            nic_gb_per_s=50,
        ),
        _machine(
            _GB200,
            name="gb200",
            tflops=2500,
            matmul_efficiency=0.68,
            fp8_tflops=5000,
            fp8_matmul_efficiency=0.67,
            idle_last_wave=0.5,
            multiprocessors=152,
            memory_gib=184.3,
            memory_gb_per_s=8000,
            nvlink_gb_per_s=900,
            nic_gb_per_s=50,
            # A rack of 72 GPUs is one NVLink domain.
            gpus_per_node=72,
            nics_per_node=72,
        ),
    )
}


def read_hardware(source: str) -> Hardware:
    """A machine by name, or from a JSON file of :class:`Hardware`'s fields.

    A file may name one of ``HARDWARE`` as ``"base"`` and change some fields of it.

    Raises:
        ValueError: neither, or fields that are unknown, missing or impossible.
    """
    if source in HARDWARE:
        return HARDWARE[source]
    path = Path(source)
    if not path.is_file():
        close = difflib.get_close_matches(source, HARDWARE, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown hardware {source!r}; {hint}give a file, or one of {', '.join(HARDWARE)}")
    return hardware_from(read_json(path, "hardware"), source)


def hardware_from(found: Any, source: str) -> Hardware:
    """Hardware from a JSON object; ``source`` is for messages and the default name."""
    if not isinstance(found, dict):
        raise ValueError(f"hardware {source}: expected a JSON object")
    base = found.get("base")
    if base is not None and base not in HARDWARE:
        raise ValueError(f"hardware {source}: base {base!r} is unknown; known: {', '.join(HARDWARE)}")
    values: dict[str, Any] = dict(HARDWARE[base].__dict__) if base else {}
    values["name"] = Path(source).stem
    known = {field.name: field for field in fields(Hardware)}
    for key, value in found.items():
        if key == "base":
            continue
        if key not in known:
            raise ValueError(f"hardware {source}: {key!r} is unknown; known: base, {', '.join(known)}")
        if key == "attention_kernels":
            values[key] = _kernels(value, source)
            continue
        if key != "name" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"hardware {source}: {key} must be a number, found {value!r:.40}")
        values[key] = value
    missing = [key for key, field in known.items() if field.default is MISSING and key not in values]
    if missing:
        raise ValueError(f"hardware {source}: {', '.join(missing)} missing; add them, or name a base")
    return Hardware(**values)


def _kernels(found: Any, source: str) -> tuple[AttentionKernel, ...]:
    """Kernels from ``{"flash-attn-2": {"forward": 0.35, "backward": 0.33}, ...}``."""
    required, known = {"forward", "backward"}, {"forward", "backward", "half_length"}
    kernels = []
    for name, rates in found.items() if isinstance(found, dict) else [("attention_kernels", found)]:
        if (
            not isinstance(rates, dict)
            or not required <= set(rates) <= known
            or any(type(value) not in (int, float) for value in rates.values())
        ):
            raise ValueError(
                f"hardware {source}: {name} needs the numbers forward, backward and perhaps half_length, "
                f"found {rates!r:.40}"
            )
        kernels.append(AttentionKernel(name, **rates))
    return tuple(kernels)
