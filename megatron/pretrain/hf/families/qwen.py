"""Qwen 2.5, with biases in QKV, and Qwen 3, with norms of queries and keys."""

from __future__ import annotations

from typing import Any

from megatron.pretrain.hf.config import ModelConfig
from megatron.pretrain.hf.families.family import (
    Model,
    attention_rules,
    decoder,
    decoder_arguments,
    mlp_rules,
    norm_rules,
    query_key_norms,
    window_arguments,
)
from megatron.pretrain.hf.rotary import rotary_arguments


def describe_qwen2(config: ModelConfig, padded_rows: int | None) -> Model:
    """See :data:`~megatron.pretrain.hf.families.family.Describe`."""
    arguments = _arguments(config) | {"add_qkv_bias": True}
    rules = (*attention_rules(arguments, qkv_bias=True), *mlp_rules(), *norm_rules())
    return decoder(config, padded_rows, arguments, rules)


def describe_qwen3(config: ModelConfig, padded_rows: int | None) -> Model:
    """See :data:`~megatron.pretrain.hf.families.family.Describe`."""
    arguments = _arguments(config) | {"qk_layernorm": True}
    config.take("head_dim")  # that it has a default of its own
    config.require("attention_bias", False)
    rules = (*attention_rules(arguments), *query_key_norms(), *mlp_rules(), *norm_rules())
    return decoder(config, padded_rows, arguments, rules)


def _arguments(config: ModelConfig) -> dict[str, Any]:
    """What both have; windows where they are used, in the layers from ``max_window_layers`` on."""
    arguments = decoder_arguments(config) | rotary_arguments(config) | {"swiglu": True}
    config.require("hidden_act", "silu")
    window, first = config.take("sliding_window", 0), config.take("max_window_layers", 28)
    kinds = config.take("layer_types", [])
    if not config.take("use_sliding_window", False) or not window:
        return arguments
    if not kinds:
        without = min(first, arguments["num_layers"])
        kinds = ["full_attention"] * without
        kinds += ["sliding_attention"] * (arguments["num_layers"] - without)
    return arguments | window_arguments(window, kinds)
