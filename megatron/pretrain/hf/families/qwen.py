"""Qwen 2.5, with biases in QKV, and Qwen 3, dense or not, with norms of queries and keys."""

from __future__ import annotations

from typing import Any

from megatron.pretrain.hf.config import ModelConfig
from megatron.pretrain.hf.families.family import (
    Model,
    attention_rules,
    decoder,
    decoder_arguments,
    expert_arguments,
    expert_rules,
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


def describe_qwen3_moe(config: ModelConfig, padded_rows: int | None) -> Model:
    """See :data:`~megatron.pretrain.hf.families.family.Describe`."""
    arguments = _arguments(config) | {"qk_layernorm": True}
    config.take("head_dim")  # that it has a default of its own
    config.require("attention_bias", False)
    config.require("decoder_sparse_step", 1)
    config.require("mlp_only_layers", [])
    config.ignore("router_aux_loss_coef")  # of training: --moe-aux-loss-coeff
    # transformers 5 writes the other name than the published files have.
    name = "num_experts" if config.has("num_experts") else "num_local_experts"
    arguments |= expert_arguments(
        config.take(name), config.take("moe_intermediate_size"), config.take("num_experts_per_tok")
    )
    if not config.take("norm_topk_prob", False):
        arguments["moe_router_pre_softmax"] = True
    experts = expert_rules(arguments, "mlp", "gate_proj", "up_proj", "down_proj")
    rules = (
        *attention_rules(arguments), *query_key_norms(), *experts, *norm_rules(before_experts=True)
    )  # fmt: skip
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
