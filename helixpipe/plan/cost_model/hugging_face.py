"""Models from Hugging Face's config.json: families, the fields they understand, and what these mean.

A field is understood, or known to decide neither shapes nor costs, or refused by name. Weights are counted as
``transformers`` builds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from helixpipe.plan.cost_model.shape import Experts, LatentAttention, ModelShape, size_of

_GATED = ("silu", "swish")
_PLAIN = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")
_EXPERTS = ("num_experts_per_tok", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
_GEMMA = ("hidden_activation", "query_pre_attn_scalar", "use_bidirectional_attention", "cache_implementation",
          "attn_logit_softcapping", "final_logit_softcapping")  # fmt: skip
_DEEPSEEK = (
    *_EXPERTS, "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "first_k_dense_replace",
    "moe_layer_freq", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    "n_group", "topk_group", "topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor",
    "aux_loss_alpha", "seq_aux", "ep_size", "rope_interleave", "auto_map",
    # transformers builds no layers for the prediction of more than one token, and neither are they planned.
    "num_nextn_predict_layers",
)  # fmt: skip
_DEEPSEEK_SIZES = (
    "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "qk_rope_head_dim",
    "qk_nope_head_dim", "v_head_dim",
)  # fmt: skip


class _Family(NamedTuple):
    """What a ``model_type`` means beyond the sizes in its file.

    Attributes:
        architecture: the class with a head over the vocabulary.
        fields: those that it understands besides the common ones.
        required: sizes whose defaults are those of one published model.
        gated: the MLP has a gate.
        activations: that are understood.
        tied: the head shares the embedding's weights unless the file says otherwise.
        norms: of the hidden state, in a layer.
        has_head_norms: queries and keys of a head are normalized.
        qkv_bias, output_bias: of attention's matrices: ``always``, ``never``, or as ``attention_bias`` says.
        has_bias: what ``attention_bias`` is taken for where the file does not say.
        full_every: one layer in so many attends to all tokens, unless ``layer_types`` says which; 0 if the
            family has no such rule.
        experts: the field that counts them; empty for a dense model.
    """

    architecture: str
    fields: tuple[str, ...] = ()
    required: tuple[str, ...] = ("num_key_value_heads",)
    gated: bool = True
    activations: tuple[str, ...] = _GATED
    tied: bool = False
    norms: int = 2
    has_head_norms: bool = False
    qkv_bias: str = "never"
    output_bias: str = "never"
    has_bias: bool = False
    full_every: int = 0
    experts: str = ""


FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(
        "LlamaForCausalLM", ("mlp_bias",), (), qkv_bias="attention_bias", output_bias="attention_bias"
    ),
    "mistral": _Family("MistralForCausalLM"),
    "mixtral": _Family(
        "MixtralForCausalLM",
        (*_EXPERTS, "num_local_experts"),
        ("num_key_value_heads", "num_experts_per_tok"),
        experts="num_local_experts",
    ),
    "qwen2": _Family("Qwen2ForCausalLM", qkv_bias="always"),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        required=("num_key_value_heads", "head_dim"),
        has_head_norms=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
    ),
    "qwen3_moe": _Family(
        "Qwen3MoeForCausalLM",
        (*_EXPERTS, "num_experts", "num_local_experts", "moe_intermediate_size", "norm_topk_prob",
         "decoder_sparse_step", "mlp_only_layers"),
        ("num_key_value_heads", "head_dim", "num_experts_per_tok", "moe_intermediate_size"),
        has_head_norms=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        experts="num_experts",
    ),
    "gemma2": _Family(
        "Gemma2ForCausalLM",
        _GEMMA,
        ("num_key_value_heads", "head_dim", "sliding_window"),
        activations=("gelu_pytorch_tanh",),
        tied=True,
        norms=4,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        full_every=2,
    ),
    "gemma3_text": _Family(
        "Gemma3ForCausalLM",
        (*_GEMMA, "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
        ("num_key_value_heads", "head_dim", "sliding_window"),
        activations=("gelu_pytorch_tanh",),
        tied=True,
        norms=4,
        has_head_norms=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        full_every=6,
    ),
    "gpt_oss": _Family(
        "GptOssForCausalLM",
        (*_EXPERTS, "num_local_experts", "experts_per_token", "swiglu_limit", "swiglu_alpha",
         "initial_context_length"),
        ("num_key_value_heads", "head_dim", "sliding_window", "num_experts_per_tok"),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        has_bias=True,
        full_every=2,
        experts="num_local_experts",
    ),
    "deepseek_v2": _Family(
        "DeepseekV2ForCausalLM",
        _DEEPSEEK,
        ("n_shared_experts", *_DEEPSEEK_SIZES),
        experts="n_routed_experts",
    ),
    "deepseek_v3": _Family(
        "DeepseekV3ForCausalLM",
        _DEEPSEEK,
        ("n_shared_experts", *_DEEPSEEK_SIZES),
        experts="n_routed_experts",
    ),
    "gpt2": _Family(
        "GPT2LMHeadModel",
        required=(),
        gated=False,
        activations=_PLAIN,
        tied=True,
    ),
}  # fmt: skip
UNDERSTOOD = (
    "architectures", "model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer",
    "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "intermediate_size", "n_inner",
    "vocab_size", "hidden_act", "activation_function", "tie_word_embeddings", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types", "attention_bias", "n_positions",
)  # fmt: skip
# Numbers of training and of generation decide no shape.
NO_SIZE = (
    "_name_or_path", "_attn_implementation", "attention_dropout", "attn_pdrop",
    "bos_token_id", "dtype", "embd_pdrop", "eos_token_id", "gradient_checkpointing", "initializer_range",
    "layer_norm_eps", "layer_norm_epsilon", "max_position_embeddings", "n_ctx", "name", "pad_token_id",
    "pretraining_tp", "reorder_and_upcast_attn", "resid_pdrop", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "scale_attn_by_inverse_layer_idx", "scale_attn_weights",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version",
    "unk_token_id", "use_cache",
)  # fmt: skip


def from_hugging_face(source: str, config: Mapping[str, Any], vocab_size: int | None = None) -> ModelShape:
    """The model of a config; ``source`` is its name in messages, ``vocab_size`` for one that does not say.

    Raises:
        ValueError: a family, field or value that is not understood, or a size that is missing.
    """
    given = {key: value for key, value in config.items() if value is not None}
    family = _family_of(source, given)
    for key in given:
        if key not in (*UNDERSTOOD, *NO_SIZE, *family.fields):
            raise not_understood(source, repr(key))

    _check_values(source, given)
    given = dict(with_vocabulary(source, given, vocab_size, ("vocab_size",)))

    def size(*keys: str, default: int | None = None) -> int:
        return size_of(source, given, keys, default)

    for key in family.required:
        size(key)
    hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    layers, latent = size("num_hidden_layers", "n_layer"), _latent(source, config)
    if latent is not None:
        head_dim = latent.rope_head_dim + size("qk_nope_head_dim")
    elif "head_dim" in given:
        head_dim = size("head_dim")
    else:
        head_dim = _head_dim(source, hidden, heads)
    shape = ModelShape(
        name=str(given.get("_name_or_path") or given.get("model_type") or Path(source).name),
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads if latent else size("num_key_value_heads", default=heads),
        head_dim=head_dim,
        ffn_hidden_size=size("intermediate_size", "n_inner", default=None if family.gated else 4 * hidden),
        vocab_size=size("vocab_size"),
        gated=family.gated,
        tied=_flag(source, given, "tie_word_embeddings", family.tied),
        windows=_windows(source, given, layers, family),
        experts=_experts(source, given, layers, family),
        latent=latent,
    )
    return replace(shape, other_parameters=_other_parameters(source, given, shape, family))


def _family_of(source: str, given: Mapping[str, Any]) -> _Family:
    """The family that a config names, or that its sizes and activation leave no doubt about."""
    name, activation = given.get("model_type"), _activation(given)
    if name is None and "n_embd" in given:
        name = "gpt2"
    elif name is None and activation in _GATED and "tie_word_embeddings" in given:
        name = "llama"
    if name is None:
        raise ValueError(
            f"model {source}: 'model_type' is missing, and the rest does not tell whether the MLP is gated "
            f"and the head tied; add one of {', '.join(FAMILIES)}"
        )
    if name == "gemma3":
        raise ValueError(
            f"model {source}: 'gemma3' has a tower for pictures, which is not understood; give its "
            "text_config"
        )
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"model {source}: the architecture {name!r:.40} is not understood; known: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    if given.get("architectures", [family.architecture]) != [family.architecture]:
        raise ValueError(
            f"model {source}: 'architectures' {given['architectures']!r:.60} is not understood; of {name} "
            f"only {family.architecture} is"
        )
    if activation is not None and activation not in family.activations:
        raise ValueError(
            f"model {source}: the activation {activation!r:.40} of {name} is not understood; known: "
            f"{', '.join(family.activations)}"
        )
    return family


def _activation(given: Mapping[str, Any]) -> Any:
    keys = ("hidden_activation", "hidden_act", "activation_function")
    return next((given[key] for key in keys if key in given), None)


def _check_values(source: str, given: Mapping[str, Any]) -> None:
    """What has to have one value, because another would be another architecture."""
    only = {"moe_layer_freq": 1, "use_bidirectional_attention": False}
    for key, value in only.items():
        if given.get(key, value) != value:
            raise not_understood(source, f"{key!r} other than {value!r}")


def _experts(source: str, given: Mapping[str, Any], num_layers: int, family: _Family) -> Experts | None:
    if not family.experts:
        return None

    def size(*keys: str, default: int | None = None) -> int:
        return size_of(source, given, keys, default)

    width = size("moe_intermediate_size", "intermediate_size")
    # transformers 5 writes num_local_experts for every family.
    count, active = size(family.experts, "num_local_experts"), size("num_experts_per_tok")
    if given.get("num_local_experts", count) != count:
        raise ValueError(f"model {source}: {family.experts} and num_local_experts differ; leave one")
    if active > count:
        raise ValueError(f"model {source}: num_experts_per_tok {active} of {count} experts")
    if given.get("experts_per_token", active) != active:
        raise ValueError(f"model {source}: experts_per_token and num_experts_per_tok differ; leave one")
    return Experts(
        count=count,
        active=active,
        ffn_hidden_size=width,
        shared_ffn_hidden_size=width * size("n_shared_experts") if "n_shared_experts" in given else 0,
        dense_layers=_dense_layers(source, given, num_layers),
    )


def _dense_layers(source: str, given: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Layers without experts: DeepSeek's first ones, or what a sparse Qwen leaves out."""
    first = given.get("first_k_dense_replace", 0)
    if "n_routed_experts" in given and "first_k_dense_replace" not in given:
        raise ValueError(f"model {source}: first_k_dense_replace is missing")
    if type(first) is not int or not 0 <= first <= num_layers:
        raise ValueError(
            f"model {source}: first_k_dense_replace must be from 0 to {num_layers}, found {first!r:.40}"
        )
    step = size_of(source, given, ("decoder_sparse_step",), 1)
    dense = given.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ValueError(f"model {source}: mlp_only_layers must be a list of layers, found {dense!r:.40}")
    return tuple(
        layer for layer in range(num_layers) if layer < first or layer in dense or (layer + 1) % step
    )


def _latent(source: str, config: Mapping[str, Any]) -> LatentAttention | None:
    if config.get("kv_lora_rank") is None:
        return None
    if "q_lora_rank" not in config:
        raise ValueError(f"model {source}: q_lora_rank is missing; null stands for queries without a latent")

    def size(key: str) -> int:
        return size_of(source, config, (key,))

    return LatentAttention(
        query_rank=0 if config["q_lora_rank"] is None else size("q_lora_rank"),
        key_value_rank=size("kv_lora_rank"),
        rope_head_dim=size("qk_rope_head_dim"),
        value_head_dim=size("v_head_dim"),
    )


def _other_parameters(source: str, given: Mapping[str, Any], shape: ModelShape, family: _Family) -> int:
    """Norms, biases, routers, sinks and learned positions, as the family's class in ``transformers`` has."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    if not family.gated:
        # GPT-2: two norms with biases, a bias to each matrix, a norm at the end, and positions.
        of_layer = 4 * hidden + 4 * hidden + ffn + hidden
        positions = size_of(source, given, ("n_positions", "max_position_embeddings"), 1024)
        return shape.num_layers * of_layer + 2 * hidden + positions * hidden
    has_bias = _flag(source, given, "attention_bias", family.has_bias)
    is_there = {"always": True, "never": False, "attention_bias": has_bias}
    of_layer = family.norms * hidden
    of_layer += 2 * shape.head_dim if family.has_head_norms else 0
    of_layer += shape.query_size + shape.key_value_size if is_there[family.qkv_bias] else 0
    of_layer += hidden if is_there[family.output_bias] else 0
    if shape.latent is not None:
        ranks = shape.latent.query_rank + shape.latent.key_value_rank
        biased = ranks + shape.latent.rope_head_dim + hidden
        of_layer += ranks + (biased if has_bias else 0)
    if _flag(source, given, "mlp_bias", False):
        of_layer += shape.fc1_size + hidden
    total = shape.num_layers * of_layer + hidden
    if shape.experts is not None:
        experts = shape.experts
        routers = experts.count * hidden
        if family is FAMILIES["gpt_oss"]:
            # Biases of the router and of the experts' matrices, and a sink for each head.
            routers += experts.count * (1 + 2 * experts.ffn_hidden_size + hidden) + shape.num_heads
        total += routers * (shape.num_layers - len(experts.dense_layers))
    return total


def _windows(source: str, given: Mapping[str, Any], num_layers: int, family: _Family) -> tuple[int, ...]:
    """How far every layer's attention reaches; empty if all layers attend to everything before."""
    has_windows = _flag(source, given, "use_sliding_window", "use_sliding_window" not in given)
    kinds = given.get("layer_types")
    if kinds is None and family.full_every:
        keys = ("sliding_window_pattern", "_sliding_window_pattern")
        every = size_of(source, given, keys, family.full_every)
        kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(num_layers)]
    elif kinds is None:
        # Qwen2's first layers have none.
        first = size_of(source, given, ("max_window_layers",), 0) if "use_sliding_window" in given else 0
        kinds = ["full_attention"] * first + ["sliding_attention"] * (num_layers - first)
        kinds = kinds[:num_layers] if "sliding_window" in given and has_windows else []
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise not_understood(source, f"'layer_types' beside {' and '.join(known)}")
    if "sliding_attention" not in kinds:
        return ()
    if len(kinds) != num_layers:
        raise ValueError(f"model {source}: {len(kinds)} 'layer_types' for {num_layers} layers")
    window = size_of(source, given, ("sliding_window",))
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _head_dim(source: str, hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ValueError(f"model {source}: {hidden} channels cannot be shared by {heads} heads")
    return hidden // heads


def _flag(source: str, given: Mapping[str, Any], key: str, default: bool) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"model {source}: {key!r} must be true or false, found {value!r:.40}")
    return value


def not_understood(source: str, what: str) -> ValueError:
    """The error for something in a file that may change shapes or costs."""
    return ValueError(
        f"model {source}: {what} is not understood, and may change shapes or costs; take it out if it does "
        "not"
    )


def with_vocabulary(
    source: str, found: Mapping[str, Any], vocab_size: int | None, keys: tuple[str, ...]
) -> Mapping[str, Any]:
    """The sizes with a vocabulary, from the file or from the caller; ``ValueError`` for neither or both."""
    is_there = any(found.get(key) is not None for key in keys)
    if is_there and vocab_size is not None:
        raise ValueError(f"model {source}: the file tells the vocabulary; leave --vocab-size out")
    if not is_there and vocab_size is None:
        raise ValueError(f"model {source}: the size of the vocabulary is missing; add --vocab-size N")
    return found if is_there else {**found, "vocab_size": vocab_size}
