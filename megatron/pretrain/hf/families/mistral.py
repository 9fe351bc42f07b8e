"""Mistral, whose first release has sliding windows, and Mixtral, a mixture of experts."""

from __future__ import annotations

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
    window_arguments,
)
from megatron.pretrain.hf.rotary import rotary_arguments


def describe(config: ModelConfig, padded_rows: int | None) -> Model:
    """See :data:`~megatron.pretrain.hf.families.family.Describe`."""
    arguments = decoder_arguments(config) | rotary_arguments(config) | {"swiglu": True}
    config.require("hidden_act", "silu")
    if not config.has("sliding_window"):
        # Left out it means 4096 tokens to transformers, and none to people.
        raise ValueError("config.json of a Mistral has no sliding_window; add it, null for none")
    window = config.take("sliding_window", 0)
    if window:
        arguments |= window_arguments(window, ["sliding_attention"] * arguments["num_layers"])
    rules = (*attention_rules(arguments), *mlp_rules(), *norm_rules())
    return decoder(config, padded_rows, arguments, rules)


def describe_mixtral(config: ModelConfig, padded_rows: int | None) -> Model:
    """See :data:`~megatron.pretrain.hf.families.family.Describe`."""
    arguments = decoder_arguments(config) | rotary_arguments(config) | {"swiglu": True}
    config.require("hidden_act", "silu")
    config.require("router_jitter_noise", 0.0)
    config.ignore("router_aux_loss_coef")  # of training: --moe-aux-loss-coeff
    window = config.take("sliding_window", 0)
    if window:
        arguments |= window_arguments(window, ["sliding_attention"] * arguments["num_layers"])
    arguments |= expert_arguments(
        config.take("num_local_experts"), arguments["ffn_hidden_size"], config.take("num_experts_per_tok")
    )
    experts = expert_rules(arguments, "block_sparse_moe", "w1", "w3", "w2")
    rules = (*attention_rules(arguments), *experts, *norm_rules(before_experts=True))
    return decoder(config, padded_rows, arguments, rules)
