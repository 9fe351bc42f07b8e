"""Qwen 2.5, with biases in QKV, and Qwen 3, with norms of queries and keys."""

from __future__ import annotations

from megatron.pretrain.hf.config import ModelConfig
from megatron.pretrain.hf.families.family import (
    Model,
    attention_rules,
    decoder,
    decoder_arguments,
    mlp_rules,
    norm_rules,
)
from megatron.pretrain.hf.rotary import rotary_arguments
from megatron.pretrain.hf.rules import LAYERS, Rule, same


def describe_qwen2(config: ModelConfig, padded_rows: int | None) -> Model:
    """See :data:`~megatron.pretrain.hf.families.family.Describe`."""
    arguments = decoder_arguments(config) | rotary_arguments(config) | {"swiglu": True, "add_qkv_bias": True}
    _require_whole_attention(config)
    rules = (*attention_rules(arguments, qkv_bias=True), *mlp_rules(), *norm_rules())
    return decoder(config, padded_rows, arguments, rules)


def describe_qwen3(config: ModelConfig, padded_rows: int | None) -> Model:
    """See :data:`~megatron.pretrain.hf.families.family.Describe`."""
    arguments = decoder_arguments(config) | rotary_arguments(config) | {"swiglu": True, "qk_layernorm": True}
    _require_whole_attention(config)
    config.require("attention_bias", False)
    rules = (*attention_rules(arguments), *query_key_norms(), *mlp_rules(), *norm_rules())
    return decoder(config, padded_rows, arguments, rules)


def query_key_norms() -> tuple[Rule, ...]:
    """Norms over the channels of each query and each key."""
    return tuple(
        same(
            f"{LAYERS}self_attention.{part}_layernorm.weight",
            f"model.layers.{{}}.self_attn.{part}_norm.weight",
        )
        for part in "qk"
    )


def _require_whole_attention(config: ModelConfig) -> None:
    config.require("hidden_act", "silu")
    config.require("use_sliding_window", False)
    config.ignore("sliding_window", "max_window_layers")  # they only mean something to sliding windows
    kinds = config.take("layer_types", [])
    if set(kinds) - {"full_attention"}:
        config.refuse("layer_types", kinds)
