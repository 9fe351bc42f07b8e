"""Rotary positions that keep nothing for the backward pass."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer import TransformerConfig
from torch import Tensor, autograd


class _Rotate(autograd.Function):
    """A rotation's transpose is the rotation back, so angles are all that its backward pass needs.

    Megatron's unfused function leaves the sines and cosines of all positions, [s, d] each, with every query
    and every key. For h = 4096, d = 128 and tp 8 with sequence parallelism these four are as large as the
    residual. The angles are Megatron's cached ones, which exist once.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, angles: Tensor, config: TransformerConfig, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.angles, ctx.config, ctx.group = angles, config, group
        output: Tensor = apply_rotary_pos_emb(tensor, angles, config=config, cp_group=group)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return (
            apply_rotary_pos_emb(grad, -ctx.angles, config=ctx.config, cp_group=ctx.group),
            None,
            None,
            None,
        )


def rotate(tensor: Tensor, angles: Tensor, config: TransformerConfig, group: dist.ProcessGroup) -> Tensor:
    """Megatron's ``apply_rotary_pos_emb``.

    Args:
        tensor: [s, b, heads, d].
        angles: [s, 1, 1, rotated part of d], the same tensor for every layer and micro batch.
        config: tells how channels are paired.
        group: of context parallelism.

    Returns:
        Like ``tensor``.
    """
    output: Tensor = _Rotate.apply(tensor, angles, config, group)
    return output
