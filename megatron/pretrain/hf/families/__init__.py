"""One short file for each family of models, and the list of them by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.pretrain.hf.config import ModelConfig
from megatron.pretrain.hf.families import gemma, gpt2, gpt_oss, llama, mistral, qwen
from megatron.pretrain.hf.families.family import Describe, Model

FAMILIES: Mapping[str, Describe] = {
    "llama": llama.describe,
    "qwen2": qwen.describe_qwen2,
    "qwen3": qwen.describe_qwen3,
    "qwen3_moe": qwen.describe_qwen3_moe,
    "mistral": mistral.describe,
    "mixtral": mistral.describe_mixtral,
    "gpt2": gpt2.describe,
    "gpt_oss": gpt_oss.describe,
    "gemma": gemma.describe,
    "gemma2": gemma.describe_gemma2,
    "gemma3_text": gemma.describe_gemma3,
}


def describe_model(config: ModelConfig, padded_rows: int | None = None) -> Model:
    """What a config.json describes.

    Args:
        config: the file.
        padded_rows: of the embedding here; None for as many as there.

    Raises:
        ValueError: a family, a field or a value that is not supported.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"models of type {config.model_type!r} are not supported; those that are: {', '.join(FAMILIES)}"
        )
    model = FAMILIES[config.model_type](config, padded_rows)
    config.finish()
    return model


def command_line(model: Model) -> list[str]:
    """The model's options of pretrain_gpt.py."""
    words = []
    for name, value in model.arguments.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(f"{value:.17g}" if isinstance(value, float) else str(value))
    return words
