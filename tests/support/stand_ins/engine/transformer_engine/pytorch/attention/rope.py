"""Fused rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _FusedRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.interleaved = interleaved
        return _rotated(tensor, angles, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        return _rotated(grad, -angles, ctx.interleaved), None, None


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    assert fused
    assert tensor_format == "sbhd"
    # The kernel reads angles as float32 [s, 1, 1, rotated].
    assert freqs.dtype is torch.float32
    assert freqs.shape[1:3] == (1, 1)
    calls.append(t.shape)
    return _FusedRope.apply(t, freqs, interleaved)


# Shapes of what was rotated.
calls: list[torch.Size] = []


def _rotated(tensor: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    size = angles.shape[-1]
    turned, rest = tensor[..., :size].float(), tensor[..., size:]
    pairs = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
    other = (-pairs[1], pairs[0])
    opposite = torch.stack(other, -1).flatten(-2) if interleaved else torch.cat(other, -1)
    result = turned * angles.cos() + opposite * angles.sin()
    return torch.cat([result.to(tensor.dtype), rest], dim=-1)
