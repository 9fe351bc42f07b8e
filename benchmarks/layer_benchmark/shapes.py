"""Which layers are measured, and what they do to keep less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch.nn.functional import silu

from helixpipe.layers.recomputing_layer import MemorySaving
from helixpipe.plan.chunk_size import automatic_size
from helixpipe.plan.cost_model import Recompute


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama layer: RMSNorm, rotary positions, SwiGLU, no biases."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    vocab_size: int = 32000

    @property
    def head_dim(self) -> int:
        """d."""
        return self.hidden_size // self.num_heads


SHAPES = {
    "7b": Shape(4096, 32, 32, 11008),
    "8k-gqa": Shape(8192, 64, 8, 28672),
    "tiny": Shape(64, 4, 2, 160, vocab_size=256),
}

# Megatron's own ways to recompute, by the arguments that ask for them; "ours" is none of them.
_MEGATRONS: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "ours": {},
}
METHODS = tuple(_MEGATRONS)


def make_config(
    shape: Shape, method: str, num_layers: int, device: torch.device, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's configuration, with its fused kernels where there is a GPU to compile them for."""
    on_gpu = device.type == "cuda"
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not on_gpu,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        gradient_accumulation_fusion=False,
        **_MEGATRONS[method],
    )


def saving_of(shape: Shape, method: str, seq_length: int, *, loss: bool = False) -> MemorySaving:
    """What our layers do: no MLP is kept nor whole. With ``loss``, every method cuts the logits."""
    loss_chunk = automatic_size(seq_length, 3 * shape.vocab_size, shape.hidden_size) if loss else None
    if method != "ours":
        return MemorySaving(loss_chunk_size=loss_chunk)
    mlp_chunk = automatic_size(seq_length, 2 * shape.ffn_hidden_size, shape.hidden_size)
    return MemorySaving(Recompute.WITHOUT_ATTENTION, mlp_chunk, loss_chunk)
