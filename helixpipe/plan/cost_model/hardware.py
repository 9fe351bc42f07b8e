"""Machines: rates that they promise, and the share of them that kernels reach."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from helixpipe.plan.json_input import read_json


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU and the links around it. Bandwidths are of one direction.

    Attributes:
        name: for people.
        tflops: peak of dense bf16 matrix products.
        matmul_efficiency: share of the peak that large matrix products reach.
        attention_forward_efficiency, attention_backward_efficiency: the same for causal flash attention, head
            dimension 128, counted with half of the square forward and 2.5 times that backward.
        memory_gib: of one GPU.
        memory_gb_per_s: peak.
        memory_efficiency: share of it that elementwise kernels reach.
        nvlink_gb_per_s: of one GPU to the others in its node.
        nic_gb_per_s: of one network card.
        link_efficiency: share of link bandwidths that NCCL reaches on large messages.
        gpus_per_node, nics_per_node: of a node.
        multiprocessors: of one GPU, over which a kernel's tiles are dealt.
        latency_ms, node_latency_ms: of a message within and between nodes.
    """

    name: str
    tflops: float
    matmul_efficiency: float
    attention_forward_efficiency: float
    attention_backward_efficiency: float
    memory_gib: float
    memory_gb_per_s: float
    memory_efficiency: float = 0.85
    nvlink_gb_per_s: float
    nic_gb_per_s: float
    link_efficiency: float = 0.8
    gpus_per_node: int = 8
    nics_per_node: int = 8
    multiprocessors: int = 132
    latency_ms: float = 0.01
    node_latency_ms: float = 0.02

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and not value > 0:
                raise ValueError(f"hardware {self.name}: {field.name} must be above 0, not {value!r}")
            if field.name.endswith("efficiency") and value > 1:
                raise ValueError(f"hardware {self.name}: {field.name} is a share of 1, not {value!r}")


# Sources. Peaks, memory and NVLink: NVIDIA's data sheets (A800: A100's with 400 GB/s NVLink; H20: 148 TFLOPS,
# 4.0 TB/s, 900 GB/s both directions together). Memory in GiB is what a GPU of 80, 96 or 141 GB reports.
#
# Attention, share of the peak: A100 0.73 forward, 0.63 backward (FlashAttention-2, arXiv 2307.08691, section
# 4.1); Hopper 0.66 forward, causal, head 128, 16k: 648 TFLOPS, and 0.55 backward (FlashAttention-3, arXiv
# 2407.08608, figures 5 and 6). H20 has the same SMs with a seventh of the matrix rate, so that softmax and
# loads hide behind products: 0.85 and 0.75, as far below its matrix products as A100's are.
#
# Matrix products: A100 0.80 and H100 0.70 of the peak, the latter limited by power (CUTLASS's published
# profiles for 8192-sized bf16 products); H20 0.92, far from its power limit.
#
# Memory: 0.85 of the peak for streaming kernels (BabelStream on A100 and H100 reaches 0.85 to 0.93). Links:
# 0.8 for large NCCL messages (nccl-tests' bus bandwidth over the link's peak, both NVLink and InfiniBand).
# Latencies: 10 and 20 microseconds for a message through NCCL's proxy.
# Multiprocessors: 78 on H20, 132 on H100 and H200, 108 on A800.
# Network cards: 400 Gb/s each on H100 and H200 (DGX), 200 Gb/s on A800 and H20 clusters.
HARDWARE: Mapping[str, Hardware] = {
    machine.name: machine
    for machine in (
        Hardware(
            name="h20",
            tflops=148,
            matmul_efficiency=0.92,
            attention_forward_efficiency=0.85,
            attention_backward_efficiency=0.75,
            memory_gib=95.0,
            memory_gb_per_s=4000,
            nvlink_gb_per_s=450,
            nic_gb_per_s=25,
            multiprocessors=78,
        ),
        Hardware(
            name="h100",
            tflops=989,
            matmul_efficiency=0.70,
            attention_forward_efficiency=0.66,
            attention_backward_efficiency=0.55,
            memory_gib=79.1,
            memory_gb_per_s=3350,
            nvlink_gb_per_s=450,
            nic_gb_per_s=50,
        ),
        Hardware(
            name="h200",
            tflops=989,
            matmul_efficiency=0.70,
            attention_forward_efficiency=0.66,
            attention_backward_efficiency=0.55,
            memory_gib=139.8,
            memory_gb_per_s=4800,
            nvlink_gb_per_s=450,
            nic_gb_per_s=50,
        ),
        Hardware(
            name="a800",
            tflops=312,
            matmul_efficiency=0.80,
            attention_forward_efficiency=0.73,
            attention_backward_efficiency=0.63,
            memory_gib=79.1,
            memory_gb_per_s=2039,
            nvlink_gb_per_s=200,
            nic_gb_per_s=25,
            multiprocessors=108,
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
        if key != "name" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"hardware {source}: {key} must be a number, found {value!r:.40}")
        values[key] = value
    missing = [key for key, field in known.items() if field.default is MISSING and key not in values]
    if missing:
        raise ValueError(f"hardware {source}: {', '.join(missing)} missing; add them, or name a base")
    return Hardware(**values)
