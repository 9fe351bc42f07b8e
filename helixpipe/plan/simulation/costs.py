"""Costs: how long each segment and each message takes, and what a forward keeps (``costs.json``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, TypeVar

from helixpipe.json_input import parse_object
from helixpipe.plan.operation import Kind
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.network import Network

ANY_EDGE = "*"

T = TypeVar("T")


@dataclass(frozen=True)
class SegmentCost:
    """Milliseconds and bytes of one micro batch in one segment.

    Attributes:
        forward: F.
        backward: B, the input gradient.
        weight: W, the weight gradient. ``backward + weight`` is the whole backward pass.
        recompute: the part of the backward pass that repeats forward work; contained in it.
        bytes: what the forward keeps until its backward.
        weight_bytes: of micro batches with W: what is held between B and W, which may be more where B
            recomputes. As much as ``bytes`` if None.
        workspace_bytes: what an operation needs while it runs, beside what it keeps.
        gradient_bytes: of a slice of a sequence, the sum of gradients of its keys and values, to which the
            backwards of later slices add, see :mod:`helixpipe.plan.context_lifetime`.
        context_bytes: of a slice, its keys and values where a rank holds them for readers and has not run
            this segment for it, or their gradients in a message.
    """

    forward: float
    backward: float
    weight: float = 0.0
    recompute: float = 0.0
    bytes: int = 0
    weight_bytes: int | None = None
    workspace_bytes: int = 0
    gradient_bytes: int = 0
    context_bytes: int = 0

    def duration_ms(self, kind: Kind, *, splits_backward: bool) -> float:
        """Milliseconds of one compute operation; B is the whole backward unless its micro batch has W."""
        if kind is Kind.F:
            return self.forward
        if kind is Kind.W:
            return self.weight
        return self.backward if splits_backward else self.backward + self.weight

    @property
    def held_for_weight(self) -> int:
        """Bytes held between B and W."""
        return self.bytes if self.weight_bytes is None else self.weight_bytes


@dataclass(frozen=True)
class RankCost:
    """What a rank pays once per iteration.

    Attributes:
        static_bytes: weights, gradients and optimizer states.
        gradient_reduction_ms: over data-parallel replicas, after the rank's last operation.
        optimizer_ms: the update, which starts when every rank has its gradients (their norm is common).
    """

    static_bytes: int = 0
    gradient_reduction_ms: float = 0.0
    optimizer_ms: float = 0.0


_NO_COST = RankCost()


class LoanBytes(NamedTuple):
    """Size of the weights that a loan of a segment sends, and of the gradients that it returns."""

    weights: int
    gradients: int


@dataclass(frozen=True)
class Costs:
    """Costs of every segment and every edge, by the plan's cost names.

    Attributes:
        segments: by cost name.
        p2p_ms: milliseconds of a message by edge, ``FROM->TO`` in forward direction; the gradient of an
            edge has its size and takes as long. ``*`` stands for every edge that is not named. Such
            messages never wait for each other. ``context/MICRO BATCH`` is a message of the keys and values of
            one micro batch; that of a context takes as long as those of all micro batches that it lends.
        message_bytes: size of a message by edge, for a ``network``.
        network: if given, messages take the time of its links and queue for them.
        ranks: what each rank pays per iteration; empty for nothing.
        loan_bytes: what loans of a segment's weights send, by segment name, for a ``network``.
    """

    segments: Mapping[str, SegmentCost]
    p2p_ms: Mapping[str, float]
    message_bytes: Mapping[str, int] | None = None
    network: Network | None = None
    ranks: tuple[RankCost, ...] = ()
    loan_bytes: Mapping[str, LoanBytes] = field(default_factory=dict)

    def duration_ms(self, kind: Kind, name: str, *, splits_backward: bool) -> float:
        """Milliseconds of one compute operation; B is the whole backward unless its micro batch has W."""
        return self.segments[name].duration_ms(kind, splits_backward=splits_backward)

    def transfer_ms(self, producer: str, consumer: str) -> float:
        """Milliseconds of a message over the edge between two segments, named in forward direction."""
        return _of_edge(self.p2p_ms, producer, consumer)

    def num_bytes(self, producer: str, consumer: str) -> int:
        """Size of a message over the edge between two segments, named in forward direction."""
        return _of_edge(self.message_bytes or {}, producer, consumer)

    def context_ms(self, name: str) -> float:
        """Milliseconds of a message of one micro batch's keys and values, or of their gradients."""
        return _named(self.p2p_ms, name)

    def context_message_bytes(self, name: str) -> int:
        """Size of a message of one micro batch's keys and values, or of their gradients."""
        return _named(self.message_bytes or {}, name)

    def rank(self, rank: int) -> RankCost:
        """What a rank pays per iteration."""
        return self.ranks[rank] if self.ranks else _NO_COST

    @property
    def least_finish_ms(self) -> float:
        """What gradient reduction and optimizer take at least after the last computation."""
        if not self.ranks:
            return 0.0
        reduction_ms = min(rank.gradient_reduction_ms for rank in self.ranks)
        return reduction_ms + max(rank.optimizer_ms for rank in self.ranks)

    def to_json(self) -> str:
        """``costs.json``, read back by :func:`parse_costs`."""
        data: dict[str, Any] = {"segments": {name: _entry(cost) for name, cost in self.segments.items()}}
        if self.network is None:
            data["p2p_ms"] = dict(self.p2p_ms)
        else:
            data["message_bytes"] = dict(self.message_bytes or {})
            data["network"] = asdict(self.network)
        if self.loan_bytes:
            data["loan_bytes"] = {name: size._asdict() for name, size in self.loan_bytes.items()}
        if self.ranks:
            data["ranks"] = [asdict(rank) for rank in self.ranks]
        return json.dumps(data, indent=1)


def uniform_costs(plan: Plan, forward: float = 1.0, backward: float = 2.0, weight: float = 0.0) -> Costs:
    """The same time for every segment and free messages."""
    cost = SegmentCost(forward, backward, weight, bytes=1)
    return Costs(dict.fromkeys(plan.cost_names, cost), {})


def _of_edge(table: Mapping[str, T], producer: str, consumer: str) -> T:
    return _named(table, f"{producer}->{consumer}")


def _named(table: Mapping[str, T], name: str) -> T:
    named = table.get(name)
    return table.get(ANY_EDGE, 0) if named is None else named  # type: ignore[return-value]


_SEGMENT_KEYS = {
    "F": "forward",
    "B": "backward",
    "W": "weight",
    "R": "recompute",
    "bytes": "bytes",
    "weight_bytes": "weight_bytes",
    "workspace_bytes": "workspace_bytes",
    "gradient_bytes": "gradient_bytes",
    "context_bytes": "context_bytes",
}


def _entry(cost: SegmentCost) -> dict[str, Any]:
    values = {key: getattr(cost, name) for key, name in _SEGMENT_KEYS.items()}
    return {key: value for key, value in values.items() if value is not None}


def parse_costs(text: str, plan: Plan) -> Costs:
    """Read ``costs.json`` for ``plan``.

    Raises:
        ValueError: invalid JSON, or a name that the plan does not have or that is missing; the message
            lists the plan's names. ``p2p_ms`` may be left out (free messages); once it names an edge, every
            edge needs a value, its own or that of ``*``. ``network`` with ``message_bytes`` takes its place.
    """
    data = parse_object(text, "costs")
    _check_names(
        data,
        {"segments", "p2p_ms", "message_bytes", "network", "ranks", "loan_bytes"},
        {"segments"},
        "costs: key",
    )
    segments = _object(data["segments"], "segments")
    names = set(plan.cost_names)
    _check_names(segments, names, names, "costs: segment")
    with_network = "network" in data
    if with_network != ("message_bytes" in data) or (with_network and "p2p_ms" in data):
        raise ValueError('costs: give messages either "p2p_ms", or "network" and "message_bytes" together')
    return Costs(
        {name: _segment_cost(name, entry) for name, entry in segments.items()},
        _edge_table(data, "p2p_ms", plan, _number),
        _edge_table(data, "message_bytes", plan, _whole) if with_network else None,
        _network(data["network"]) if with_network else None,
        _rank_costs(data.get("ranks", []), plan),
        _loan_bytes(data.get("loan_bytes", {}), plan),
    )


def _edge_table(
    data: Mapping[str, Any], key: str, plan: Plan, convert: Callable[[Any, str], T]
) -> dict[str, T]:
    table = _object(data.get(key, {}), key)
    edges = _edges(plan)
    _check_names(
        table, edges | {ANY_EDGE}, edges if table and ANY_EDGE not in table else set(), "costs: edge"
    )
    return {edge: convert(value, f"{key} {edge}") for edge, value in table.items()}


def _edges(plan: Plan) -> set[str]:
    """Names of the edges that cross ranks for at least one micro batch, and of the contexts' messages."""
    representatives = {plan.cost_name(0, i): i for i in range(plan.num_microbatches)}.values()
    return {
        f"{plan.cost_name(s, i)}->{plan.cost_name(s + 1, i)}"
        for s in range(plan.num_segments - 1)
        if plan.placement[s] != plan.placement[s + 1]
        for i in representatives
    } | {plan.context_cost_name(i) for context in plan.contexts for i in context.lent}


def _segment_cost(name: str, entry: Any) -> SegmentCost:
    entry = _object(entry, f"segment {name}")
    _check_names(entry, set(_SEGMENT_KEYS), {"F", "B"}, f"costs: segment {name}: key")
    values: dict[str, Any] = {
        _SEGMENT_KEYS[key]: (_whole if key.endswith("bytes") else _number)(value, f"segment {name}: {key}")
        for key, value in entry.items()
    }
    cost = SegmentCost(**values)
    if cost.recompute > cost.backward + cost.weight:
        raise ValueError(
            f"costs: segment {name}: R ({cost.recompute:g}) is part of the backward pass "
            f"B + W ({cost.backward + cost.weight:g}) and cannot exceed it"
        )
    return cost


def _network(entry: Any) -> Network:
    entry = _object(entry, "network")
    names = {field.name for field in fields(Network)}
    _check_names(entry, names, {"latency_ms", "gb_per_s"}, "costs: network: key")
    values: dict[str, Any] = {
        key: (_whole if key == "ranks_per_node" else _number)(value, f"network: {key}")
        for key, value in entry.items()
    }
    try:
        return Network(**values)
    except ValueError as error:
        raise ValueError(f"costs: {error}") from None


def _rank_costs(entries: Any, plan: Plan) -> tuple[RankCost, ...]:
    if not isinstance(entries, list) or len(entries) not in (0, plan.num_ranks):
        raise ValueError(f"costs: ranks must be a list with one entry for each of {plan.num_ranks} ranks")
    names = {field.name for field in fields(RankCost)}
    ranks = []
    for number, entry in enumerate(entries):
        _check_names(_object(entry, f"rank {number}"), names, set(), f"costs: rank {number}: key")
        values: dict[str, Any] = {
            key: (_whole if key.endswith("bytes") else _number)(value, f"rank {number}: {key}")
            for key, value in entry.items()
        }
        ranks.append(RankCost(**values))
    return tuple(ranks)


def _loan_bytes(entries: Any, plan: Plan) -> dict[str, LoanBytes]:
    lent = {plan.segment_names[loan.segment] for loan in plan.loans}
    _check_names(_object(entries, "loan_bytes"), lent, set(), "costs: loan of segment")
    sizes = {}
    for name, entry in entries.items():
        keys = set(LoanBytes._fields)
        _check_names(_object(entry, f"loan_bytes {name}"), keys, keys, f"costs: loan_bytes {name}: key")
        sizes[name] = LoanBytes(
            **{key: _whole(value, f"loan_bytes {name}: {key}") for key, value in entry.items()}
        )
    return sizes


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


def _whole(value: Any, what: str) -> int:
    number = _number(value, what)
    if number != int(number):
        raise ValueError(f"costs: {what} must be a whole number, found {value!r}")
    return int(number)
