"""Transformer Engine's own attention module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


class DotProductAttention(TransformerEngineBaseModule):
    """Causal attention of [s, b, heads, d]."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
    ) -> None:
        super().__init__()
        self.window_size, self.softmax_scale = window_size, softmax_scale
        self.attention_dropout = attention_dropout

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        attn_mask_type: str | None = None,
    ) -> Tensor:
        assert attn_mask_type == "causal"
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query_layer, key_layer, value_layer))
        distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
        seen = distance >= 0
        if self.window_size is not None:
            seen = seen & (distance <= self.window_size[0])
        output = functional.scaled_dot_product_attention(
            query, key, value, seen, self.attention_dropout if self.training else 0.0,
            scale=self.softmax_scale, enable_gqa=True,
        )  # fmt: skip
        return output.permute(2, 0, 1, 3).flatten(2)
