"""Llama 2, 3, 3.1, 3.2 and 3.3."""

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


def describe(config: ModelConfig, padded_rows: int | None) -> Model:
    """See :data:`~megatron.pretrain.hf.families.family.Describe`."""
    arguments = decoder_arguments(config) | rotary_arguments(config) | {"swiglu": True}
    config.require("hidden_act", "silu")
    config.require("attention_bias", False)
    config.require("mlp_bias", False)
    config.require("pretraining_tp", 1, 2)  # of how it was trained; Llama 2's says 2 at times
    rules = (*attention_rules(arguments), *mlp_rules(), *norm_rules())
    return decoder(config, padded_rows, arguments, rules)
