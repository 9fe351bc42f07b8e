"""Mistral, whose first release has sliding windows."""

from __future__ import annotations

from megatron.pretrain.hf.config import ModelConfig
from megatron.pretrain.hf.families.family import (
    Model,
    attention_rules,
    decoder,
    decoder_arguments,
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
