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
from megatron.pretrain.hf.rules import by_layer


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
    config.ignore("router_aux_loss_coef")  # of training: --moe-aux-loss-coeff
    # transformers 5 writes the other name than the published files have.
    name = "num_experts" if config.has("num_experts") else "num_local_experts"
    arguments |= expert_arguments(
        config.take(name), config.take("moe_intermediate_size"), config.take("num_experts_per_tok")
    )
    if not config.take("norm_topk_prob", False):
        arguments["moe_router_pre_softmax"] = True
    common = (*attention_rules(arguments), *query_key_norms())
    experts = expert_rules(arguments, "mlp", "gate_proj", "up_proj", "down_proj")
    rules = (*common, *experts, *norm_rules(before_experts=True))
    has_experts = _has_experts(config, arguments["num_layers"])
    if not all(has_experts):
        arguments["moe_layer_freq"] = f"[{','.join(map(str, has_experts))}]"
        rules = by_layer(has_experts, rules, (*common, *mlp_rules(), *norm_rules()))
    return decoder(config, padded_rows, arguments, rules)


def _has_experts(config: ModelConfig, num_layers: int) -> list[int]:
    """1 for each layer with experts, 0 for each with an MLP of ``intermediate_size``."""
    step, dense = config.take("decoder_sparse_step", 1), config.take("mlp_only_layers", [])
    if type(step) is not int or step < 1:
        config.refuse("decoder_sparse_step", step)
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        config.refuse("mlp_only_layers", dense)
    found = [int((layer + 1) % step == 0 and layer not in dense) for layer in range(num_layers)]
    if not any(found):
        raise ValueError("config.json of a qwen3_moe leaves no layer with experts; make it a qwen3")
    return found


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
