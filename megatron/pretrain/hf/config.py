"""A model's config.json, of which every field is understood or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helixpipe.json_input import parse_object

CONFIG = "config.json"
_REQUIRED = object()

# What no weight and no number of training depends on.
_NEUTRAL = frozenset((
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path",
    "use_cache", "cache_implementation", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
    "return_dict", "output_hidden_states", "output_attentions", "output_router_logits", "is_encoder_decoder",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "task_specific_params",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "tokenizer_class",
))  # fmt: skip


class ModelConfig:
    """What a config.json says. Each field is read once, and :meth:`finish` refuses those that never were.

    Args:
        values: the file's.
        source: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = {name: value for name, value in values.items() if name not in _NEUTRAL}
        self._read: set[str] = set()
        self._source = source
        self.model_type = str(values.get("model_type"))

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """A field's value; ``default`` where the field is missing or null.

        Raises:
            ValueError: it is missing, and there is no default.
        """
        self._read.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"{self._source} has no {name}, which a {self.model_type} model needs; add it")
        return default

    def has(self, name: str) -> bool:
        """Whether the field is there, be it null."""
        return name in self._values

    def require(self, name: str, *accepted: Any) -> None:
        """A field that, where it is there, has one of these values.

        Raises:
            ValueError: it has another one.
        """
        value = self.take(name, accepted[0])
        if value not in accepted:
            self.refuse(name, value)

    def ignore(self, *names: str) -> None:
        """Fields that mean nothing to this model."""
        self._read.update(names)

    def refuse(self, name: str, value: Any) -> None:
        """Say that a field's value is not supported.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self._source}: {name} {_short(value)} is not supported for {self.model_type}")

    def finish(self) -> None:
        """Refuse what was not read.

        Raises:
            ValueError: a field that nobody asked for.
        """
        for name in sorted(self._values.keys() - self._read):
            if self._values[name] is not None:
                raise ValueError(
                    f"{self._source}: {name} {_short(self._values[name])} is not understood for "
                    f"{self.model_type}; remove it if it changes nothing that is computed"
                )


def read_config(folder: Path) -> ModelConfig:
    """The config.json of a model's folder.

    Raises:
        ValueError: none is there, or it is no JSON object.
    """
    path = folder / CONFIG
    try:
        return ModelConfig(parse_object(path.read_bytes(), str(path)), str(path))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {CONFIG}; give the folder of a model on Hugging Face") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
