"""Names of modules and parameters as a user knows them: with the layer's number in the whole model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from helixpipe.layers.initialization import canonical_parameters
from megatron.pretrain.model import unwrap

_LAYER = re.compile(r"^(.*?\blayers\.\d+)(?=\.|$)")


def canonical_names(chunk: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and parameters of a wrapped model chunk."""
    yield from canonical_parameters(unwrap(chunk))


def canonical_modules(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Names and modules without modules in them, of a wrapped model chunk."""
    model = unwrap(chunk)
    for name, module in model.named_modules():
        if not any(module.children()):
            yield _in_whole_model(model, name), module


def layer_of(name: str) -> int | None:
    """The layer's number, from 0, in a canonical name; None outside of layers."""
    match = re.search(r"\blayers\.(\d+)", name)
    return int(match[1]) if match else None


def _in_whole_model(model: torch.nn.Module, name: str) -> str:
    match = _LAYER.match(name)
    if match is None:
        return name
    layer: Any = model.get_submodule(match[1])
    stem = match[1].rpartition(".")[0]
    return f"{stem}.{layer.layer_number - 1}{name[match.end() :]}"
