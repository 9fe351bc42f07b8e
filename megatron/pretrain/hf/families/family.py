"""What a family of models is to the conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.pretrain.hf.config import ModelConfig
from megatron.pretrain.hf.rules import LAYERS, Rule, grouped, padded, same, stacked


@dataclass(frozen=True)
class Model:
    """What a config.json describes.

    Attributes:
        arguments: options of pretrain_gpt.py by name; True for a switch.
        rules: every tensor of the model, once.
        aliases: tensors that files may hold besides, by the tensor that they must equal.
        computed: ends of names of tensors that follow from the configuration, and are left out.
        prefix: begins names, and may be missing in files.
    """

    arguments: dict[str, Any]
    rules: tuple[Rule, ...]
    aliases: dict[str, str]
    computed: tuple[str, ...] = ("rotary_emb.inv_freq",)
    prefix: str = ""


# The config.json and the rows of the embedding, None for those that it has, to the model.
Describe = Callable[[ModelConfig, int | None], Model]


def decoder_arguments(config: ModelConfig) -> dict[str, Any]:
    """The options that all decoders with RMSNorm, grouped queries and no biases of linear layers share.

    What a file may leave out of them means the same to all families.
    """
    heads, hidden = config.take("num_attention_heads"), config.take("hidden_size")
    groups = (heads,) if config.model_type == "llama" else ()  # the others have defaults of their own
    arguments = {
        "num_layers": config.take("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": config.take("intermediate_size"),
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": config.take("num_key_value_heads", *groups),
        "kv_channels": config.take("head_dim", hidden // heads),
        "max_position_embeddings": config.take("max_position_embeddings"),
        "normalization": "RMSNorm",
        "norm_epsilon": config.take("rms_norm_eps"),
        "disable_bias_linear": True,
    }
    config.ignore("attention_dropout")  # none is trained with, and the kernels have none
    return arguments


def attention_rules(arguments: dict[str, Any], *, qkv_bias: bool = False) -> tuple[Rule, ...]:
    """QKV, by groups, and the projection of a layer that has them as ``self_attn``."""
    heads, groups = arguments["num_attention_heads"], arguments["num_query_groups"]
    rules = [same(f"{LAYERS}self_attention.linear_proj.weight", "model.layers.{}.self_attn.o_proj.weight")]
    for kind in ("weight", "bias") if qkv_bias else ("weight",):
        query, key, value = (f"model.layers.{{}}.self_attn.{part}_proj.{kind}" for part in "qkv")
        ours = f"{LAYERS}self_attention.linear_qkv.{kind}"
        rules.append(grouped(ours, (query, key, value), heads, groups))
    return tuple(rules)


def query_key_norms() -> tuple[Rule, ...]:
    """Norms over the channels of each query and each key."""
    return tuple(
        same(
            f"{LAYERS}self_attention.{part}_layernorm.weight",
            f"model.layers.{{}}.self_attn.{part}_norm.weight",
        )
        for part in "qk"
    )


def mlp_rules() -> tuple[Rule, ...]:
    """A gated MLP."""
    theirs = "model.layers.{}.mlp."
    return (
        stacked(f"{LAYERS}mlp.linear_fc1.weight", f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"),
        same(f"{LAYERS}mlp.linear_fc2.weight", f"{theirs}down_proj.weight"),
    )


def expert_arguments(count: int, width: int, topk: int) -> dict[str, Any]:
    """The options of a mixture of experts whose scores are a softmax over those that are chosen.

    Args:
        count: of experts.
        width: of one.
        topk: experts of a token.
    """
    return {"num_experts": count, "moe_ffn_hidden_size": width, "moe_router_topk": topk}


def expert_rules(arguments: dict[str, Any], block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """A mixture of gated MLPs and its router.

    Args:
        arguments: with those of experts.
        block: their name of the mixture, in a layer.
        gate, up, down: their names of an expert's matrices.
    """
    theirs, ours = f"model.layers.{{}}.{block}.", f"{LAYERS}mlp.experts.experts."
    first, second, third = (f"{theirs}experts.{{}}.{name}.weight" for name in (gate, up, down))
    count = arguments["num_experts"]
    return (
        same(f"{LAYERS}mlp.router.weight", f"{theirs}gate.weight"),
        stacked(f"{ours}linear_fc1.weight", first, second).of_experts(count),
        same(f"{ours}linear_fc2.weight", third).of_experts(count),
    )


def window_arguments(window: int, layer_types: list[str]) -> dict[str, Any]:
    """The options for windows of so many tokens, in the layers of that type.

    Raises:
        ValueError: a type that is not known.
    """
    kinds = {"sliding_attention": 1, "full_attention": 0}
    unknown = sorted(set(layer_types) - kinds.keys())
    if unknown:
        raise ValueError(f"layer_types {unknown[0]!r} is not supported; only {' and '.join(kinds)} are")
    pattern = [kinds[kind] for kind in layer_types]
    if not any(pattern):
        return {}
    arguments: dict[str, Any] = {"window_size": f"{window - 1},0"}
    if not all(pattern):
        arguments["window_attn_skip_freq"] = f"[{','.join(map(str, pattern))}]"
    return arguments


def alternating_types(num_layers: int, every: int) -> list[str]:
    """Windows in all layers but one in so many."""
    return [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(num_layers)
    ]


def norm_rules(*, before_experts: bool = False) -> tuple[Rule, ...]:
    """The norms before attention and MLP, or mixture of experts, and the one before the head."""
    theirs = "model.layers.{}."
    second = "pre_mlp_layernorm.weight" if before_experts else "mlp.linear_fc1.layer_norm_weight"
    return (
        same(f"{LAYERS}self_attention.linear_qkv.layer_norm_weight", f"{theirs}input_layernorm.weight"),
        same(f"{LAYERS}{second}", f"{theirs}post_attention_layernorm.weight"),
        same("decoder.final_layernorm.weight", "model.norm.weight"),
    )


def decoder(
    config: ModelConfig,
    padded_rows: int | None,
    arguments: dict[str, Any],
    rules: tuple[Rule, ...],
    *,
    tied: bool = False,
    embedding: str = "model.embed_tokens.weight",
) -> Model:
    """A decoder with its embedding and its head.

    Args:
        config: of the model.
        padded_rows: of the embedding here; None for as many as there.
        arguments: options of what lies between.
        rules: of what lies between.
        tied: whether the head is the embedding, if config.json says nothing of it.
        embedding: its name.
    """
    rows = config.take("vocab_size")
    padded_rows = rows if padded_rows is None else padded_rows
    if padded_rows < rows:
        raise ValueError(
            f"--padded-vocab-size {padded_rows} is less than the model's {rows}; use at least that"
        )
    head = "lm_head.weight"
    ends = [padded("embedding.word_embeddings.weight", embedding, rows, padded_rows)]
    is_tied = config.take("tie_word_embeddings", tied)
    if not is_tied:
        ends.append(padded("output_layer.weight", head, rows, padded_rows))
        arguments = {**arguments, "untie_embeddings_and_output_weights": True}
    arguments = {**arguments, "padded_vocab_size": padded_rows}
    return Model(arguments, (*ends, *rules), aliases={head: embedding} if is_tied else {})
