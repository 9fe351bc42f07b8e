"""Rotary positions of packed, joined and sliced sequences."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.transformer import TransformerConfig
from torch import Tensor, autograd

from helixpipe.layers.rotary import angles_of, rotated


def angles_at(rotary: RotaryEmbedding, positions: Tensor) -> Tensor:
    """The rows of Megatron's table of angles at ``positions``, which need not follow each other.

    Args:
        rotary: of the model.
        positions: [b, s], whole numbers up to 2^24.

    Returns:
        [s, b, 1, rotated part of d] in float32.
    """
    if isinstance(rotary, YarnRotaryEmbedding):
        # Its frequencies are its angles at position 1.
        angles = positions.t()[..., None].to(torch.float32) * angles_of(rotary, 2)[1].flatten()
        return angles[:, :, None]
    rows = positions.t().reshape(-1).to(rotary.inv_freq.dtype)
    if rotary.seq_len_interpolation_factor is not None:
        rows = rows * (1 / rotary.seq_len_interpolation_factor)
    if rotary.inv_freq.device != positions.device:
        # Megatron makes it on the host, and moves it for good at its first use, too: a copy for every layer
        # and chunk would each time wait for the device.
        rotary.inv_freq = rotary.inv_freq.to(positions.device)
    angles = torch.outer(rows, rotary.inv_freq)
    if rotary.rotary_interleaved:
        angles = angles.repeat_interleave(2, dim=-1)
    else:
        angles = torch.cat((angles, angles), dim=-1)
    return angles.view(positions.shape[1], positions.shape[0], 1, -1)


class _RotateAt(autograd.Function):
    """A rotation's transpose is the rotation back, so positions are all that its backward pass needs."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        positions: Tensor,
        rotary: RotaryEmbedding,
        config: TransformerConfig,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        ctx.positions, ctx.rotary, ctx.config, ctx.group = positions, rotary, config, group
        return _rotate(ctx, query, key, angles_at(rotary, positions))

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        angles = -angles_at(ctx.rotary, ctx.positions)
        return (*_rotate(ctx, grad_query, grad_key, angles), None, None, None, None)


def _rotate(ctx: Any, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    return rotated(query, angles, ctx.config, ctx.group), rotated(key, angles, ctx.config, ctx.group)


def rotate_at(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    rotary: RotaryEmbedding,
    config: TransformerConfig,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Megatron's ``apply_rotary_pos_emb`` for tokens at any positions.

    Args:
        query: [s, b, heads, d].
        key: [s, b, groups, d].
        positions: [b, s].
        rotary: of the model.
        config: tells how channels are paired.
        group: of context parallelism.

    Returns:
        Query and key, rotated.
    """
    output: tuple[Tensor, Tensor] = _RotateAt.apply(query, key, positions, rotary, config, group)
    return output
