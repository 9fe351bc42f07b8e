"""Bandwidth of each kernel against a copy on the same device, and the time of the same work in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from helixpipe import kernels
from helixpipe.kernels.extension import load
from layer_benchmark.measure import percentiles, timed
from layer_benchmark.shapes import SHAPES

aten = torch.ops.aten


class Case(NamedTuple):
    """A kernel's call, torch's form of it, and the bytes that must be read and written."""

    name: str
    kernel: Callable[[], object]
    torch_form: Callable[[], object]
    num_bytes: int


def measure_kernels(task: dict[str, Any], device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for the copy, then one for each kernel; without kernels (on a CPU) torch's time alone."""
    repeats, length = task["repeats"], task["seq_length"]
    source = torch.randn(length, 4 * SHAPES[task["shape"]].hidden_size, device=device).to(dtype)
    target = torch.empty_like(source)
    copied = percentiles("forward", timed(lambda: target.copy_(source), device, repeats))
    copy_rate = 2 * source.nbytes / copied["forward_ms"] / 1e6
    rows = [{"method": "copy", **copied, "gigabytes_per_second": copy_rate, "share_of_copy": 1.0}]
    has_kernels = device.type == "cuda" and load() is not None
    for case in _cases(task["shape"], length, device, dtype):
        row = {"method": case.name}
        if has_kernels:
            row |= percentiles("forward", timed(case.kernel, device, repeats))
            rate = case.num_bytes / row["forward_ms"] / 1e6
            row |= {"gigabytes_per_second": rate, "share_of_copy": rate / copy_rate}
        row["torch_ms"] = percentiles("torch", timed(case.torch_form, device, repeats))["torch_ms"]
        rows.append(row)
    return rows


def _cases(shape_name: str, length: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    shape = SHAPES[shape_name]

    def random(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, device=device, dtype=dtype)

    yield from _merges(shape.num_heads, shape.head_dim, length, random, dtype)
    yield from _swiglu(shape.ffn_hidden_size, length, random)
    yield from _gelu(4 * shape.hidden_size, length, random)
    yield from _messages(shape.num_heads, shape.head_dim, length, random)
    total = random(4 * shape.hidden_size, 4 * shape.ffn_hidden_size, dtype=torch.float32)
    gradient = random(*total.shape)
    yield Case(
        "accumulate",
        lambda: kernels.accumulate(total, gradient),
        lambda: total.add_(gradient),
        2 * total.nbytes + gradient.nbytes,
    )


def _merges(heads: int, d: int, length: int, random: Any, dtype: torch.dtype) -> Iterator[Case]:
    part = random(length, 1, heads, d).permute(1, 2, 0, 3)
    part_sums = random(1, heads, length, dtype=torch.float32)
    for sum_type in dict.fromkeys((dtype, torch.float32)):
        output = random(length, 1, heads, d, dtype=sum_type).permute(1, 2, 0, 3)
        sums = random(1, heads, length, dtype=torch.float32)

        def in_torch(output: Tensor = output, sums: Tensor = sums) -> None:
            merged = torch.logaddexp(sums, part_sums)
            total = output * (sums - merged).exp().unsqueeze(-1)
            output.copy_(total.add_(part * (part_sums - merged).exp().unsqueeze(-1)))
            sums.copy_(merged)

        def by_kernel(output: Tensor = output, sums: Tensor = sums) -> None:
            kernels.merge_attention(output, sums, part, part_sums)

        moved = 2 * output.nbytes + part.nbytes + 2 * sums.nbytes + part_sums.nbytes
        yield Case(f"merge_attention into {str(sum_type).removeprefix('torch.')}", by_kernel, in_torch, moved)


def _swiglu(width: int, length: int, random: Any) -> Iterator[Case]:
    wide, out, grad, grad_wide = (random(length, n) for n in (2 * width, width, width, 2 * width))
    gate, up = wide.chunk(2, dim=-1)

    def backward() -> None:
        grad_wide[:, :width] = aten.silu_backward(grad * up, gate)
        torch.mul(grad, functional.silu(gate), out=grad_wide[:, width:])

    yield Case(
        "swiglu",
        lambda: kernels.swiglu(out, wide),
        lambda: torch.mul(functional.silu(gate), up, out=out),
        wide.nbytes + out.nbytes,
    )
    yield Case(
        "swiglu_backward",
        lambda: kernels.swiglu_backward(grad_wide, grad, wide),
        backward,
        2 * wide.nbytes + grad.nbytes,
    )


def _gelu(width: int, length: int, random: Any) -> Iterator[Case]:
    wide, out, grad, bias = random(length, width), random(length, width), random(length, width), random(width)
    for form in ("tanh", "none"):

        def backward(form: str = form) -> None:
            out.copy_(aten.gelu_backward(grad, wide + bias, approximate=form))

        yield Case(
            f"gelu {form}",
            lambda form=form: kernels.gelu(out, wide, bias, form),
            lambda form=form: out.copy_(functional.gelu(wide + bias, approximate=form)),
            2 * wide.nbytes,
        )
        yield Case(
            f"gelu_backward {form}",
            lambda form=form: kernels.gelu_backward(out, grad, wide, bias, form),
            backward,
            3 * wide.nbytes,
        )


def _messages(heads: int, d: int, length: int, random: Any) -> Iterator[Case]:
    """Queries, keys and values as Megatron's projection gives them, interleaved, and the residual."""
    mixed = random(length, 1, heads, 3 * d)
    tensors = [*mixed.split(d, dim=-1), random(length, 1, heads * d)]
    buffer = torch.cat([tensor.reshape(-1) for tensor in tensors])
    yield Case(
        "pack",
        lambda: kernels.pack(buffer, tensors),
        lambda: torch.cat([tensor.reshape(-1) for tensor in tensors], out=buffer),
        2 * buffer.nbytes,
    )
