"""gpt-oss: experts with biases and clamped gates, sinks in every layer and windows in every other, YaRN."""

from __future__ import annotations

from megatron.pretrain.hf.config import ModelConfig
from megatron.pretrain.hf.families.family import (
    Model,
    alternating_types,
    attention_rules,
    decoder,
    decoder_arguments,
    expert_arguments,
    norm_rules,
    window_arguments,
)
from megatron.pretrain.hf.rotary import rotary_arguments
from megatron.pretrain.hf.rules import LAYERS, Rule, alternating, same, transposed

_BASE = 150_000.0
_LARGEST_GATE = 7.0
_GATE_SLOPE = 1.702  # a constant of Megatron's


def describe(config: ModelConfig, padded_rows: int | None) -> Model:
    """See :data:`~megatron.pretrain.hf.families.family.Describe`."""
    _check(config)
    arguments = decoder_arguments(config) | rotary_arguments(config, base=_BASE)
    del arguments["disable_bias_linear"]
    config.take("head_dim")  # that it has a default of its own
    arguments |= {
        "quick_geglu": True,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": float(config.take("swiglu_limit", _LARGEST_GATE)),
        "softmax_type": "learnable",
    }
    kinds = config.take("layer_types", []) or alternating_types(arguments["num_layers"], 2)
    arguments |= window_arguments(config.take("sliding_window"), kinds)
    topk = config.take("num_experts_per_tok")
    config.require("experts_per_token", topk)
    arguments |= expert_arguments(config.take("num_local_experts"), arguments["ffn_hidden_size"], topk)
    rules = (
        *attention_rules(arguments, qkv_bias=True), *_other_rules(), *norm_rules(before_experts=True)
    )  # fmt: skip
    return decoder(config, padded_rows, arguments, rules)


def _check(config: ModelConfig) -> None:
    """Refuse what is another model, or would be one by a default of transformers'."""
    if config.take("quantization_config", None) is not None:
        raise ValueError(
            "config.json has a quantization_config, and weights in 4 bits are not read; save the model in "
            "bfloat16 first: transformers' from_pretrained with Mxfp4Config(dequantize=True), then "
            "save_pretrained"
        )
    if not (config.take("rope_parameters", {}) or config.take("rope_scaling", {})):
        # Left out it means a YaRN of its own to transformers, and none to people.
        raise ValueError("config.json of a gpt-oss has no rope_scaling; add it")
    config.require("hidden_act", "silu")
    config.require("attention_bias", True)
    config.require("swiglu_alpha", _GATE_SLOPE)
    # Of training: --moe-aux-loss-coeff; and what YaRN says, too.
    config.ignore("router_aux_loss_coef", "initial_context_length")


def _other_rules() -> tuple[Rule, ...]:
    """What other families do not have: more biases, sinks, and experts that are one tensor."""
    theirs, experts = "model.layers.{}.", f"{LAYERS}mlp.experts.experts."
    rules = [
        same(f"{LAYERS}self_attention.linear_proj.bias", f"{theirs}self_attn.o_proj.bias"),
        same(f"{LAYERS}self_attention.core_attention.softmax_offset", f"{theirs}self_attn.sinks"),
        transposed(f"{experts}linear_fc2.weight", f"{theirs}mlp.experts.down_proj"),
        same(f"{experts}linear_fc2.bias", f"{theirs}mlp.experts.down_proj_bias"),
    ]
    for kind, end in (("weight", ""), ("bias", "_bias")):
        rules += [
            same(f"{LAYERS}mlp.router.{kind}", f"{theirs}mlp.router.{kind}"),
            alternating(f"{experts}linear_fc1.{kind}", f"{theirs}mlp.experts.gate_up_proj{end}"),
        ]
    return tuple(rules)
