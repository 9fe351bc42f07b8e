"""Rotary positions of a config.json as options of pretrain_gpt.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron.pretrain.hf.config import ModelConfig

Arguments = dict[str, Any]

# Megatron's function has these as constants.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rotary_arguments(
    config: ModelConfig, parameters: Mapping[str, Any] | None = None, *, base: float = 10000.0
) -> Arguments:
    """The options for rotary positions with or without scaling, in the form of transformers 4 or 5.

    Args:
        config: the file.
        parameters: of the layers that are meant; None for the same in all, ``rope_parameters``.
        base: where the file says nothing.

    Raises:
        ValueError: a scaling that is not supported.
    """
    rope = dict(config.take("rope_parameters", {}) if parameters is None else parameters)
    rope.update(config.take("rope_scaling", {}))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    base = rope.pop("rope_theta", base)
    arguments: Arguments = {
        "position_embedding_type": "rope",
        "rotary_base": _whole(config, config.take("rope_theta", base)),
    }
    share = rope.pop("partial_rotary_factor", config.take("partial_rotary_factor", 1.0))
    if share != 1.0:
        arguments["rotary_percent"] = share
    arguments |= _scaling(config, kind, rope)
    if rope:
        config.refuse("rope_parameters", rope)
    return arguments


def _scaling(config: ModelConfig, kind: str, rope: dict[str, Any]) -> Arguments:
    """The options for a kind of scaling; takes what it understands out of ``rope``."""
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rotary_seq_len_interpolation_factor": float(rope.pop("factor"))}
    if kind == "llama3":
        for name, value in _LLAMA3.items():
            if rope.pop(name, value) != value:
                raise ValueError(
                    f"{name} of llama3's rotary scaling must be {value:g}, as in every released model: it "
                    "is a constant of Megatron's"
                )
        return {"use_rope_scaling": True, "rope_scaling_factor": float(rope.pop("factor"))}
    if kind == "yarn":
        return _yarn(config, rope)
    if kind == "dynamic":
        raise ValueError(
            "rope_type 'dynamic' is not supported: it turns one position differently for each length; use "
            "'default' with the rope_theta of one length"
        )
    config.refuse("rope_type", kind)
    return {}


def _yarn(config: ModelConfig, rope: dict[str, Any]) -> Arguments:
    factor = float(rope.pop("factor"))
    expected = 0.1 * math.log(factor) + 1.0
    if abs(rope.pop("attention_factor", expected) - expected) > 1e-9:
        config.refuse("attention_factor", "other than YaRN's own")
    longest = config.take("max_position_embeddings")
    arguments: Arguments = {
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": rope.pop("original_max_position_embeddings", longest),
        "yarn_beta_fast": float(rope.pop("beta_fast", 32.0)),
        "yarn_beta_slow": float(rope.pop("beta_slow", 1.0)),
    }
    if not rope.pop("truncate", True):
        arguments["no_yarn_correction_range_round_to_int"] = True
    return arguments


def _whole(config: ModelConfig, base: float) -> int:
    if base != int(base):
        config.refuse("rope_theta", base)
    return int(base)
