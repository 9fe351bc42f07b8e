"""``costs.json`` of the ``elastic`` command: a :class:`ChunkCosts` as a file.

Keys, all of them in :class:`ChunkCosts` and :class:`PassTime`: ``format``, ``version``, ``source``;
``forward`` and ``backward`` with ``attention_ms``, ``token_ms`` and, 0 if left out, ``layer_ms``,
``communication_ms``, ``head_ms``; ``token_bytes``, ``input_bytes``, ``kv_bytes``; and, if not the default,
``kv_gradient_bytes``, ``logits_bytes``, ``head_workspace_bytes``, ``layer_workspace_bytes``,
``tensor_parallel``, ``token_multiple``, ``layer_state_bytes``, ``embedding_state_bytes``,
``head_state_bytes``, ``shared_state_bytes``, ``network``, the fields of
:class:`helixpipe.plan.simulation.network.Network`, ``cut``, those of
:class:`helixpipe.elastic.costs.layer_cut.LayerCut`, and ``cuts_with_weights``, a list of such.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar

from helixpipe.elastic.costs.chunk_costs import ChunkCosts, PassTime
from helixpipe.elastic.costs.layer_cut import CutLevel, LayerCut
from helixpipe.json_input import parse_object
from helixpipe.plan.simulation.network import Network

FORMAT = "helixpipe-chunk-costs"
VERSION = 1

_WHOLE = {
    "tensor_parallel",
    "token_multiple",
    "layer_state_bytes",
    "embedding_state_bytes",
    "head_state_bytes",
    "shared_state_bytes",
    "ranks_per_node",
    "lent_weight_bytes",
    "lent_gradient_bytes",
    "qkv_weight_bytes",
    "qkv_gradient_bytes",
    "projection_weight_bytes",
    "projection_gradient_bytes",
}

T = TypeVar("T")


def costs_to_json(costs: ChunkCosts) -> str:
    """The file's text, read back by :func:`costs_from_json`."""
    return json.dumps({"format": FORMAT, "version": VERSION, **asdict(costs)}, indent=1) + "\n"


def costs_from_json(text: str) -> ChunkCosts:
    """Read the file; ``ValueError`` names the key that is wrong."""
    data = parse_object(text, "costs")
    if data.get("format") != FORMAT or data.get("version") != VERSION:
        raise ValueError(
            f'costs: "format" must be "{FORMAT}" and "version" {VERSION}; costs of a plan\'s segments are '
            "another file"
        )
    body = {key: value for key, value in data.items() if key not in ("format", "version")}
    _check_keys(body, ChunkCosts, "costs")
    values: dict[str, Any] = {}
    for key, value in body.items():
        if key in ("forward", "backward"):
            values[key] = PassTime(**_numbers(value, PassTime, key))
        elif key == "network":
            values[key] = None if value is None else _network(value)
        elif key == "cut":
            values[key] = None if value is None else _cut(value)
        elif key == "cuts_with_weights":
            values[key] = tuple(map(_cut, _list_of(value, key)))
        elif key == "kv_gradient_bytes" and value is None:
            values[key] = None
        elif key == "source":
            values[key] = str(value)
        else:
            values[key] = _number(value, key)
    return _made(ChunkCosts, values)


def _network(found: Any) -> Network:
    return _made(Network, _numbers(found, Network, "network"))


def _cut(found: Any) -> LayerCut:
    numbers = _numbers(found, LayerCut, "cut", {"levels", "attention_range"})
    values = {**numbers, "levels": tuple(map(_level, _list_of(found["levels"], "cut.levels")))}
    return _made(LayerCut, {**values, "attention_range": str(found.get("attention_range", "core"))})


def _list_of(found: Any, where: str) -> list[Any]:
    if not isinstance(found, list):
        raise ValueError(f"costs: {where} must be a list, found {found!r:.60}")
    return found


def _level(found: Any) -> CutLevel:
    numbers = _numbers(found, CutLevel, "cut.levels", {"recompute"})
    return _made(CutLevel, {**numbers, "recompute": str(found["recompute"])})


def _made(kind: Callable[..., T], values: Mapping[str, Any]) -> T:
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"costs: {error}") from None


def _numbers(found: Any, kind: type, where: str, others: Collection[str] = ()) -> dict[str, Any]:
    """The numbers of an object, all of whose keys are known; ``others`` are no numbers."""
    if not isinstance(found, dict):
        raise ValueError(f"costs: {where} must be an object, found {found!r:.60}")
    _check_keys(found, kind, f"costs: {where}")
    return {key: _number(value, f"{where}.{key}") for key, value in found.items() if key not in others}


def _check_keys(found: Mapping[str, Any], kind: Any, where: str) -> None:
    known = {entry.name: entry for entry in fields(kind)}
    for key in found:
        if key not in known:
            raise ValueError(f"{where}: {key!r} is unknown; known: {', '.join(known)}")
    missing = [key for key, entry in known.items() if entry.default is MISSING and key not in found]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing")


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"costs: {where} must be a number that is not negative, found {value!r:.60}")
    if where.rpartition(".")[2] in _WHOLE:
        if value != int(value):
            raise ValueError(f"costs: {where} must be a whole number, found {value!r}")
        return int(value)
    return value
