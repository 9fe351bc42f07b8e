"""Costs: how long each segment and each message takes, and what a forward keeps (``costs.json``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helixpipe.plan.operation import Kind
from helixpipe.plan.plan import Plan

ANY_EDGE = "*"


@dataclass(frozen=True)
class SegmentCost:
    """Milliseconds and bytes of one micro batch in one segment.

    Attributes:
        forward: F.
        backward: B, the input gradient.
        weight: W, the weight gradient. ``backward + weight`` is the whole backward pass.
        recompute: the part of the backward pass that repeats forward work; contained in it.
        bytes: what the forward keeps until its backward.
    """

    forward: float
    backward: float
    weight: float = 0.0
    recompute: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class Costs:
    """Costs of every segment and every edge, by segment name.

    Attributes:
        segments: by segment name.
        p2p_ms: milliseconds of a message by edge, ``FROM->TO`` in forward direction; the gradient of an
            edge has its size and takes as long. ``*`` stands for every edge that is not named.
    """

    segments: Mapping[str, SegmentCost]
    p2p_ms: Mapping[str, float]

    def duration_ms(self, kind: Kind, name: str, *, splits_backward: bool) -> float:
        """Milliseconds of one compute operation; B is the whole backward unless the plan has W."""
        cost = self.segments[name]
        if kind is Kind.F:
            return cost.forward
        if kind is Kind.W:
            return cost.weight
        return cost.backward if splits_backward else cost.backward + cost.weight

    def transfer_ms(self, producer: str, consumer: str) -> float:
        """Milliseconds of a message over the edge between two segments, named in forward direction."""
        named = self.p2p_ms.get(f"{producer}->{consumer}")
        return self.p2p_ms.get(ANY_EDGE, 0.0) if named is None else named

    @property
    def bytes_of_segment(self) -> dict[str, int]:
        """What a forward keeps, by segment name."""
        return {name: cost.bytes for name, cost in self.segments.items()}


def uniform_costs(plan: Plan, forward: float = 1.0, backward: float = 2.0) -> Costs:
    """The same time for every segment and free messages."""
    return Costs({name: SegmentCost(forward, backward, bytes=1) for name in set(plan.segment_names)}, {})


def parse_costs(text: str, plan: Plan) -> Costs:
    """Read ``costs.json`` for ``plan``.

    Raises:
        ValueError: invalid JSON, or a name that the plan does not have or that is missing; the message
            lists the plan's names. ``p2p_ms`` may be left out (free messages); once it names an edge, every
            edge needs a value, its own or that of ``*``.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"costs: invalid JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError('costs: expected an object with "segments" and "p2p_ms"')
    _check_names(data, {"segments", "p2p_ms"}, {"segments"}, "costs: key")
    segments = _object(data["segments"], "segments")
    names = set(plan.segment_names)
    _check_names(segments, names, names, "costs: segment")
    p2p = _object(data.get("p2p_ms", {}), "p2p_ms")
    edges = _edges(plan)
    _check_names(p2p, edges | {ANY_EDGE}, edges if p2p and ANY_EDGE not in p2p else set(), "costs: edge")
    return Costs(
        {name: _segment_cost(name, entry) for name, entry in segments.items()},
        {edge: _number(value, f"p2p_ms {edge}") for edge, value in p2p.items()},
    )


def _edges(plan: Plan) -> set[str]:
    """Names of the edges that cross ranks for at least one micro batch."""
    names, placement = plan.segment_names, plan.placement
    return {
        f"{names[s]}->{names[s + 1]}"
        for s in range(plan.num_segments - 1)
        if placement[s] != placement[s + 1]
    }


def _segment_cost(name: str, entry: Any) -> SegmentCost:
    entry = _object(entry, f"segment {name}")
    _check_names(entry, {"F", "B", "W", "R", "bytes"}, {"F", "B"}, f"costs: segment {name}: key")
    values = {key: _number(value, f"segment {name}: {key}") for key, value in entry.items()}
    if values.get("bytes", 0) != int(values.get("bytes", 0)):
        raise ValueError(f"costs: segment {name}: bytes must be a whole number, found {entry['bytes']!r}")
    cost = SegmentCost(
        forward=values["F"],
        backward=values["B"],
        weight=values.get("W", 0.0),
        recompute=values.get("R", 0.0),
        bytes=int(values.get("bytes", 0)),
    )
    if cost.recompute > cost.backward + cost.weight:
        raise ValueError(
            f"costs: segment {name}: R ({cost.recompute:g}) is part of the backward pass "
            f"B + W ({cost.backward + cost.weight:g}) and cannot exceed it"
        )
    return cost


def _check_names(found: Mapping[str, Any], known: set[str], required: set[str], what: str) -> None:
    listed = ", ".join(sorted(known))
    for name in found:
        if name not in known:
            raise ValueError(f"{what} {name!r} is unknown; known: {listed}")
    for name in sorted(required):
        if name not in found:
            raise ValueError(f"{what} {name!r} is missing; needed: {', '.join(sorted(required))}")


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"costs: {what} must be an object, found {value!r:.60}")
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"costs: {what} must be a number that is not negative, found {value!r:.60}")
    return value
