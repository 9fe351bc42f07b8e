"""Gemma, Gemma 2 and the text models of Gemma 3.

All have norms around 1, a scaled embedding, and GELU by tanh in a gated MLP.

Gemma 2 also has norms after attention and MLP, windows in every other layer, and caps of scores and logits.
Gemma 3 has windows in most layers, where rotary positions have a base of their own, and norms of queries and
keys in the place of caps.
"""

from __future__ import annotations

from typing import Any

from megatron.pretrain.hf.config import ModelConfig
from megatron.pretrain.hf.families.family import (
    Model,
    alternating_types,
    attention_rules,
    decoder,
    decoder_arguments,
    mlp_rules,
    norm_rules,
    query_key_norms,
    window_arguments,
)
from megatron.pretrain.hf.rotary import rotary_arguments
from megatron.pretrain.hf.rules import LAYERS, Rule, same

_LOCAL_BASE, _GLOBAL_BASE = 10_000.0, 1_000_000.0
_EVERY = 6  # one layer in so many sees all tokens, where nothing else is said


def describe(config: ModelConfig, padded_rows: int | None) -> Model:
    """See :data:`~megatron.pretrain.hf.families.family.Describe`."""
    arguments = _shared(config) | rotary_arguments(config)
    rules = (*attention_rules(arguments), *mlp_rules(), *norm_rules())
    return decoder(config, padded_rows, arguments, rules, tied=True)


def describe_gemma2(config: ModelConfig, padded_rows: int | None) -> Model:
    """See :data:`~megatron.pretrain.hf.families.family.Describe`."""
    arguments = _shared(config) | rotary_arguments(config) | {"sandwich_norm": True}
    arguments["softmax_scale"] = config.take("query_pre_attn_scalar") ** -0.5
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not config.has(name):
            raise ValueError(f"config.json of a Gemma 2 has no {name}; add it, null for none")
        cap = config.take(name, None)
        if cap is not None:
            arguments[name] = float(cap)
    kinds = config.take("layer_types", []) or alternating_types(arguments["num_layers"], 2)
    arguments |= window_arguments(config.take("sliding_window"), kinds)
    rules = (*attention_rules(arguments), *mlp_rules(), *_four_norms())
    return decoder(config, padded_rows, arguments, rules, tied=True)


def describe_gemma3(config: ModelConfig, padded_rows: int | None) -> Model:
    """See :data:`~megatron.pretrain.hf.families.family.Describe`."""
    arguments = _shared(config) | {"qk_layernorm": True, "sandwich_norm": True}
    arguments["softmax_scale"] = config.take("query_pre_attn_scalar") ** -0.5
    config.require("attn_logit_softcapping", None)
    config.require("final_logit_softcapping", None)
    every = config.take("_sliding_window_pattern", config.take("sliding_window_pattern", _EVERY))
    kinds = config.take("layer_types", []) or alternating_types(arguments["num_layers"], every)
    arguments |= window_arguments(config.take("sliding_window"), kinds) | _two_bases(config)
    rules = (*attention_rules(arguments), *query_key_norms(), *mlp_rules(), *_four_norms())
    return decoder(config, padded_rows, arguments, rules, tied=True)


def _shared(config: ModelConfig) -> dict[str, Any]:
    arguments = decoder_arguments(config)
    arguments |= {"geglu": True, "apply_layernorm_1p": True, "scale_embedding": True}
    config.take("head_dim")  # that it has a default of its own
    config.require("hidden_activation", "gelu_pytorch_tanh")
    # Gemma's first files say "gelu", and mean the other.
    config.require("hidden_act", "gelu_pytorch_tanh", "gelu")
    config.require("attention_bias", False)
    config.require("use_bidirectional_attention", False)
    return arguments


def _two_bases(config: ModelConfig) -> dict[str, Any]:
    """Rotary positions, by layer type since transformers 5."""
    rope = config.take("rope_parameters", {})
    local = dict(rope.get("sliding_attention", {}))
    base = local.pop("rope_theta", config.take("rope_local_base_freq", _LOCAL_BASE))
    if local.pop("rope_type", "default") != "default" or local:
        config.refuse("rope_parameters", rope)
    arguments = rotary_arguments(config, rope.get("full_attention", {}), base=_GLOBAL_BASE)
    return arguments | {"rotary_base_local": int(base)}


def _four_norms() -> tuple[Rule, ...]:
    theirs = "model.layers.{}."
    names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
        "self_attention.linear_proj.post_layernorm.weight": "post_attention_layernorm",
        "mlp.linear_fc1.layer_norm_weight": "pre_feedforward_layernorm",
        "mlp.linear_fc2.post_layernorm.weight": "post_feedforward_layernorm",
    }
    rules = [same(f"{LAYERS}{ours}", f"{theirs}{name}.weight") for ours, name in names.items()]
    return (*rules, same("decoder.final_layernorm.weight", "model.norm.weight"))
