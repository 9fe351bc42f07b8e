"""Models from files: a Hugging Face config, or Megatron's arguments in a script or as JSON.

What decides a model's shapes or costs is read; what is known to decide neither is passed over; everything
else is refused by name. A mixture of experts read as a dense model would be planned with a fifth of its
weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from helixpipe.plan.cost_model.script import NEUTRAL, SIZES, SWITCHES, arguments_of_script
from helixpipe.plan.cost_model.shape import MODELS, ModelShape, size_of


def read_model(source: str, vocab_size: int | None = None) -> ModelShape:
    """A model by name, or from a file.

    Args:
        source: a key of ``MODELS``, a Hugging Face ``config.json``, a JSON object of Megatron argument names,
            or a script with Megatron arguments.
        vocab_size: words, for a file that does not say; None if it does.

    Raises:
        ValueError: neither a name nor a file, sizes that are missing, or something in the file that is not
            understood; the message names it.
    """
    if source in MODELS:
        if vocab_size is not None:
            raise ValueError(f"--vocab-size is part of the model {source}; leave it out")
        return MODELS[source]
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"unknown model {source!r}; give a file or one of {', '.join(MODELS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"model {source}: not a text file") from None
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return _from_megatron(source, arguments_of_script(source, text), vocab_size)
    if not isinstance(found, dict):
        raise ValueError(f"model {source}: expected a JSON object of sizes")
    if "num_layers" in found:
        return _from_megatron(source, found, vocab_size)
    return _from_hugging_face(source, found, vocab_size)


def model_from_arguments(source: str, arguments: Mapping[str, Any]) -> ModelShape:
    """A model from Megatron's arguments, with padded vocabulary; ``source`` is its name in messages."""

    def size(key: str, default: int | None = None) -> int:
        return size_of(source, arguments, (key,), default)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    groups = size("num_query_groups", heads) if arguments.get("group_query_attention") else heads
    return ModelShape(
        name=Path(source).name,
        num_layers=size("num_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=size("kv_channels", hidden // heads),
        ffn_hidden_size=size("ffn_hidden_size", 4 * hidden),
        vocab_size=size("padded_vocab_size" if arguments.get("padded_vocab_size") else "vocab_size"),
        gated=bool(arguments.get("swiglu", False)),
        tied=not arguments.get("untie_embeddings_and_output_weights", False),
    )


def _from_megatron(source: str, found: Mapping[str, Any], vocab_size: int | None) -> ModelShape:
    given = {key: value for key, value in found.items() if value is not None and value is not False}
    for key in given:
        name = key.replace("_", "-")
        if name not in SIZES and name not in SWITCHES and name not in NEUTRAL:
            raise _not_understood(source, f"--{name}")
    if given.get("swiglu") and "ffn_hidden_size" not in given:
        raise ValueError(
            f"model {source}: --swiglu without --ffn-hidden-size means different widths to different "
            "programs; add --ffn-hidden-size"
        )
    if "num_query_groups" in given and not given.get("group_query_attention"):
        raise ValueError(f"model {source}: --num-query-groups needs --group-query-attention")
    with_words = _with_vocabulary(source, given, vocab_size, ("padded_vocab_size", "vocab_size"))
    return model_from_arguments(source, with_words)


def _with_vocabulary(
    source: str, found: Mapping[str, Any], vocab_size: int | None, keys: tuple[str, ...]
) -> Mapping[str, Any]:
    """The sizes with a vocabulary, from the file or from the caller."""
    is_there = any(found.get(key) is not None for key in keys)
    if is_there and vocab_size is not None:
        raise ValueError(f"model {source}: the file tells the vocabulary; leave --vocab-size out")
    if not is_there and vocab_size is None:
        raise ValueError(f"model {source}: the size of the vocabulary is missing; add --vocab-size N")
    return found if is_there else {**found, "vocab_size": vocab_size}


class _Family(NamedTuple):
    """What a ``model_type`` means beyond the sizes in its file.

    Attributes:
        architecture: the class with a head over the vocabulary.
        gated: the MLP has a gate.
        tied: the head shares the embedding's weights unless the file says otherwise.
        required: sizes whose defaults are those of one published model.
    """

    architecture: str
    gated: bool
    tied: bool
    required: tuple[str, ...] = ()


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family("LlamaForCausalLM", gated=True, tied=False),
    "mistral": _Family("MistralForCausalLM", gated=True, tied=False, required=("num_key_value_heads",)),
    "qwen2": _Family("Qwen2ForCausalLM", gated=True, tied=False, required=("num_key_value_heads",)),
    "qwen3": _Family(
        "Qwen3ForCausalLM", gated=True, tied=False, required=("num_key_value_heads", "head_dim")
    ),
    "gpt2": _Family("GPT2LMHeadModel", gated=False, tied=True),
}
_GATED_ACTIVATIONS = ("silu", "swish")
_PLAIN_ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")
_UNDERSTOOD = (
    "architectures", "model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer",
    "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "intermediate_size", "n_inner",
    "vocab_size", "hidden_act", "activation_function", "tie_word_embeddings", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types",
)  # fmt: skip
# Norms and biases are left out of the costs; numbers of training and of generation decide no shape.
_NO_SIZE = (
    "_name_or_path", "_attn_implementation", "attention_bias", "attention_dropout", "attn_pdrop",
    "bos_token_id", "dtype", "embd_pdrop", "eos_token_id", "gradient_checkpointing", "initializer_range",
    "layer_norm_eps", "layer_norm_epsilon", "max_position_embeddings", "mlp_bias", "n_ctx", "n_positions",
    "name", "pad_token_id", "pretraining_tp", "qkv_bias", "reorder_and_upcast_attn", "resid_pdrop",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "tokenizer_class", "torch_dtype",
    "transformers_version", "unk_token_id", "use_cache",
)  # fmt: skip


def _from_hugging_face(source: str, config: Mapping[str, Any], vocab_size: int | None) -> ModelShape:
    given = {key: value for key, value in config.items() if value is not None}
    for key in given:
        if key not in _UNDERSTOOD and key not in _NO_SIZE:
            raise _not_understood(source, repr(key))
    family = _family_of(source, given)
    given = dict(_with_vocabulary(source, given, vocab_size, ("vocab_size",)))

    def size(*keys: str, default: int | None = None) -> int:
        return size_of(source, given, keys, default)

    hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    for key in family.required:
        size(key)
    return ModelShape(
        name=str(given.get("_name_or_path") or given.get("model_type") or Path(source).name),
        num_layers=size("num_hidden_layers", "n_layer"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", default=heads),
        head_dim=size("head_dim", default=_head_dim(source, hidden, heads)),
        ffn_hidden_size=size("intermediate_size", "n_inner", default=None if family.gated else 4 * hidden),
        vocab_size=size("vocab_size"),
        gated=family.gated,
        tied=_flag(source, given, "tie_word_embeddings", family.tied),
        windows=_windows(source, given, size("num_hidden_layers", "n_layer")),
    )


def _family_of(source: str, given: Mapping[str, Any]) -> _Family:
    """The family that a config names, or that its sizes and activation leave no doubt about."""
    name, activation = given.get("model_type"), given.get("hidden_act", given.get("activation_function"))
    if name is None and "n_embd" in given:
        name = "gpt2"
    elif name is None and activation in _GATED_ACTIVATIONS and "tie_word_embeddings" in given:
        name = "llama"
    if name is None:
        raise ValueError(
            f"model {source}: 'model_type' is missing, and the rest does not tell whether the MLP is gated "
            f"and the head tied; add one of {', '.join(_FAMILIES)}"
        )
    if not isinstance(name, str) or name not in _FAMILIES:
        raise ValueError(
            f"model {source}: the architecture {name!r:.40} is not understood; known: {', '.join(_FAMILIES)}"
        )
    family = _FAMILIES[name]
    if given.get("architectures", [family.architecture]) != [family.architecture]:
        raise ValueError(
            f"model {source}: 'architectures' {given['architectures']!r:.60} is not understood; of {name} "
            f"only {family.architecture} is"
        )
    known = _GATED_ACTIVATIONS if family.gated else _PLAIN_ACTIVATIONS
    if activation is not None and activation not in known:
        raise ValueError(
            f"model {source}: the activation {activation!r:.40} of {name} is not understood; known: "
            f"{', '.join(known)}"
        )
    return family


def _windows(source: str, given: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """How far every layer's attention reaches; empty if all layers attend to everything before."""
    has_windows = _flag(source, given, "use_sliding_window", "use_sliding_window" not in given)
    kinds = given.get("layer_types")
    if kinds is None:
        # Qwen2's first layers have none.
        first = size_of(source, given, ("max_window_layers",), 0) if "use_sliding_window" in given else 0
        kinds = ["full_attention"] * first + ["sliding_attention"] * (num_layers - first)
        kinds = kinds[:num_layers] if "sliding_window" in given and has_windows else []
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise _not_understood(source, f"'layer_types' beside {' and '.join(known)}")
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


def _not_understood(source: str, what: str) -> ValueError:
    return ValueError(
        f"model {source}: {what} is not understood, and may change shapes or costs; take it out if it does "
        "not"
    )
