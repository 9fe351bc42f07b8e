"""GPT-2: learned positions, LayerNorm and biases; its matrices are stored as [in, out]."""

from __future__ import annotations

from dataclasses import replace

from megatron.pretrain.hf.config import ModelConfig
from megatron.pretrain.hf.families.family import Model, decoder
from megatron.pretrain.hf.rules import LAYERS, Rule, grouped_whole, same, transposed

_THEIRS = "transformer.h.{}."


def describe(config: ModelConfig, padded_rows: int | None) -> Model:
    """See :data:`~megatron.pretrain.hf.families.family.Describe`."""
    hidden, heads = config.take("n_embd"), config.take("n_head")
    arguments = {
        "num_layers": config.take("n_layer"),
        "hidden_size": hidden,
        "ffn_hidden_size": config.take("n_inner", 4 * hidden),
        "num_attention_heads": heads,
        "max_position_embeddings": config.take("n_positions"),
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "norm_epsilon": config.take("layer_norm_epsilon", 1e-5),
        "openai_gelu": True,
    }
    config.require("activation_function", "gelu_new")
    config.require("scale_attn_weights", True)
    config.require("scale_attn_by_inverse_layer_idx", False)
    config.require("add_cross_attention", False)
    # How exact a product is, what dropout there was, and a head for summaries.
    config.ignore("reorder_and_upcast_attn", "resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx")
    config.ignore(*(f"summary_{name}" for name in (
        "type", "use_proj", "activation", "proj_to_labels", "first_dropout",
    )))  # fmt: skip
    model = decoder(
        config, padded_rows, arguments, _rules(heads), tied=True, embedding="transformer.wte.weight"
    )
    return replace(model, computed=(".attn.bias", ".attn.masked_bias"), prefix="transformer.")


def _rules(heads: int) -> tuple[Rule, ...]:
    rules = [same("embedding.position_embeddings.weight", "transformer.wpe.weight")]
    for kind in ("weight", "bias"):
        rules += [
            grouped_whole(f"{LAYERS}self_attention.linear_qkv.{kind}", f"{_THEIRS}attn.c_attn.{kind}", heads),
            same(f"{LAYERS}self_attention.linear_qkv.layer_norm_{kind}", f"{_THEIRS}ln_1.{kind}"),
            same(f"{LAYERS}mlp.linear_fc1.layer_norm_{kind}", f"{_THEIRS}ln_2.{kind}"),
            same(f"decoder.final_layernorm.{kind}", f"transformer.ln_f.{kind}"),
        ]
        matrix = transposed if kind == "weight" else same
        for ours, theirs in (
            ("self_attention.linear_proj", "attn.c_proj"),
            ("mlp.linear_fc1", "mlp.c_fc"),
            ("mlp.linear_fc2", "mlp.c_proj"),
        ):
            rules.append(matrix(f"{LAYERS}{ours}.{kind}", f"{_THEIRS}{theirs}.{kind}"))
    return tuple(rules)
