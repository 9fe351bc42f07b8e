"""Models from files: a Hugging Face config, or Megatron's arguments in a script or as JSON.

What decides a model's shapes or costs is read; what is known to decide neither is passed over; everything
else is refused by name. A mixture of experts read as a dense model would be planned with a fifth of its
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helixpipe.json_input import parse_json
from helixpipe.plan.cost_model.hugging_face import from_hugging_face, not_understood, with_vocabulary
from helixpipe.plan.cost_model.script import NEUTRAL, PATTERNS, SIZES, SWITCHES, arguments_of_script
from helixpipe.plan.cost_model.shape import MODELS, Experts, ModelShape, size_of
from helixpipe.plan.layer_patterns import experts_of_layers, parse_expert_frequency
from helixpipe.plan.windows import parse_skip_frequency, parse_window, windows_of_layers


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
        found = parse_json(text, source)
    except ValueError:
        return _from_megatron(source, arguments_of_script(source, text), vocab_size)
    if not isinstance(found, dict):
        raise ValueError(f"model {source}: expected a JSON object of sizes")
    if "num_layers" in found:
        return _from_megatron(source, found, vocab_size)
    return from_hugging_face(source, found, vocab_size)


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
        gated=any(arguments.get(name) for name in ("swiglu", "geglu", "quick_geglu")),
        tied=not arguments.get("untie_embeddings_and_output_weights", False),
        windows=_windows_of_arguments(arguments, size("num_layers")),
        experts=_experts_of_arguments(source, arguments, size("num_layers")),
    )


def _experts_of_arguments(source: str, arguments: Mapping[str, Any], num_layers: int) -> Experts | None:
    """A mixture of experts, with Megatron's defaults."""
    if arguments.get("num_experts") is None:
        return None
    frequency = arguments.get("moe_layer_freq", 1)
    try:
        if not isinstance(frequency, tuple):
            frequency = parse_expert_frequency(str(frequency))
        has_experts = experts_of_layers(frequency, num_layers)
    except ValueError as error:
        raise ValueError(f"model {source}: {error}") from None
    return Experts(
        count=size_of(source, arguments, ("num_experts",)),
        active=size_of(source, arguments, ("moe_router_topk",), 2),
        ffn_hidden_size=size_of(source, arguments, ("moe_ffn_hidden_size", "ffn_hidden_size")),
        shared_ffn_hidden_size=0
        if arguments.get("moe_shared_expert_intermediate_size") is None
        else size_of(source, arguments, ("moe_shared_expert_intermediate_size",)),
        dense_layers=tuple(layer for layer, has in enumerate(has_experts) if not has),
    )


def _windows_of_arguments(arguments: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Of a training program's options, or of their texts in a script."""
    window, frequency = arguments.get("window_size"), arguments.get("window_attn_skip_freq")
    window = parse_window(window) if isinstance(window, str) else window
    frequency = parse_skip_frequency(frequency) if isinstance(frequency, str) else frequency
    return windows_of_layers(window, frequency, num_layers)


def _from_megatron(source: str, found: Mapping[str, Any], vocab_size: int | None) -> ModelShape:
    given = {key: value for key, value in found.items() if value is not None and value is not False}
    for key in given:
        name = key.replace("_", "-")
        if name not in SIZES and name not in SWITCHES and name not in NEUTRAL | PATTERNS:
            raise not_understood(source, f"--{name}")
    if given.get("swiglu") and "ffn_hidden_size" not in given:
        raise ValueError(
            f"model {source}: --swiglu without --ffn-hidden-size means different widths to different "
            "programs; add --ffn-hidden-size"
        )
    if "num_query_groups" in given and not given.get("group_query_attention"):
        raise ValueError(f"model {source}: --num-query-groups needs --group-query-attention")
    with_words = with_vocabulary(source, given, vocab_size, ("padded_vocab_size", "vocab_size"))
    return model_from_arguments(source, with_words)
