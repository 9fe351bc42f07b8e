"""From pieces to a plan's segments: times, kept bytes and messages under each way of recomputing."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from helixpipe.plan.cost_model.pieces import PieceCost, Pieces
from helixpipe.plan.cost_model.recomputation import (
    ACTIVATION,
    FOR_WEIGHT,
    Part,
    Recompute,
    cut,
    in_chunks,
    split_cut,
    whole_layer,
)
from helixpipe.plan.cost_model.slices import (
    WHOLE,
    Slice,
    core_cost,
    equal_forward_slices,
    equal_total_slices,
    slices_up_to,
)
from helixpipe.plan.cost_model.work import GRADIENT_BYTES, Workload
from helixpipe.plan.plan import Plan
from helixpipe.plan.segment_names import role_of
from helixpipe.plan.simulation.costs import ANY_EDGE, Costs, LoanBytes, RankCost, SegmentCost
from helixpipe.plan.slice_ends import slice_ends
from helixpipe.plan.stage_layers import STAGE_LAYERS, layers_of_stages

_EMBEDDING, _HEAD = Part(("embedding",)), Part(("head",))
# What is as wide as the MLP.
_OF_THE_MLP = ("fc1 output", "activation")
# What a piece that is computed again makes.
_REGAINED_BY_ATTENTION = {
    "norm1": "norm1 output",
    "qkv": "qkv",
    "core": "attention output",
    "proj": "norm2 input",
}
_REGAINED_BY_MLP = {"norm2": "norm2 output", "fc1": "fc1 output", ACTIVATION: "activation"}


class _Builder:
    """Adds parts up to segments for one choice of recomputation."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.workload = pieces.workload
        self.tensors = self.workload.kept_tensors
        layers = range(self.workload.model.num_layers)
        self.shares = [_shares(self.workload, layer) for layer in layers]
        # Stages of a plan are mostly alike.
        self.segment = cache(self._segment)
        # Plans of one layout are mostly cut alike.
        self.segments: dict[Hashable, dict[str, SegmentCost]] = {}

    def _segment(self, parts: tuple[Part, ...], part_of: Slice = WHOLE) -> SegmentCost:
        """The cost of parts that run on one rank, one after the other."""
        if self.workload.mlp_chunk_size is not None:
            parts = tuple(map(in_chunks, parts))
        names = [piece for part in parts for piece in part.pieces]
        costs = [self._time(piece, part_of, part) for part in parts for piece in part.pieces]
        recompute = sum(self._again_ms(piece, part_of, part) for part in parts for piece in part.recomputed)
        if "head" in names and not self.workload.whole_logits:
            # A loss in chunks computes each chunk's logits again in the backward pass.
            recompute += self._again_ms("head", part_of, _HEAD)
        overhead = self.pieces.overhead_ms
        kept = sum(self._bytes(name, part) for part in parts for name in part.kept)
        for_weight = sum(
            self._bytes(name, part)
            for part in parts
            for piece in part.pieces
            for name in FOR_WEIGHT.get(piece, ())
        )
        if "head" in names:
            kept += self.workload.head_bytes
            # W needs the gradient of the logits; a loss in chunks has used it up.
            gradient = self.workload.num_logits * self.workload.element_bytes
            for_weight += gradient if self.workload.whole_logits else 0
        return SegmentCost(
            forward=sum(cost.forward for cost in costs) + overhead,
            backward=sum(cost.backward for cost in costs) + recompute + overhead,
            weight=sum(cost.weight for cost in costs),
            recompute=recompute,
            bytes=int(kept * part_of.tokens),
            weight_bytes=int(for_weight * part_of.tokens),
            workspace_bytes=int(self._workspace(parts, names) * part_of.tokens),
        )

    def _workspace(self, parts: Sequence[Part], names: list[str]) -> int:
        """What is there in a backward beside what was kept: of the head, of the MLP or of attention."""
        workload, tensors = self.workload, self.tensors
        # What was not kept exists again while its part is computed backward.
        again = {piece for part in parts for piece in part.recomputed}
        of_attention = sum(tensors[name] for piece, name in _REGAINED_BY_ATTENTION.items() if piece in again)
        of_mlp = sum(tensors[name] for piece, name in _REGAINED_BY_MLP.items() if piece in again)
        if "fc1" in again:
            of_mlp += tensors["activation"]
        of_mlp = int(of_mlp * workload.mlp_share)
        if "fc1" in names:
            of_mlp += workload.mlp_workspace_bytes
        if "core" in names and "qkv" in again:
            # Rotary positions are not in place.
            of_attention += workload.rotated_bytes
        if "fc2" in again:
            # All of a layer is computed again before any of it is computed backward.
            of_mlp += of_attention
        if "core" in names:
            of_attention += workload.attention_workspace_bytes
        return max(of_mlp, of_attention, workload.head_workspace_bytes if "head" in names else 0)

    def _bytes(self, name: str, part: Part) -> float:
        return self.tensors[name] * (part.mlp_share if name in _OF_THE_MLP else 1.0)

    def _time(self, piece: str, part_of: Slice, part: Part) -> PieceCost:
        cost, share = self.pieces.times[piece], part_of.tokens
        if piece == "core":
            cost, share = core_cost(self.pieces, part_of), part.core_share
        elif piece in ("fc1", "fc2"):
            share *= part.mlp_share
        return PieceCost(cost.forward * share, cost.backward * share, cost.weight * share)

    def _again_ms(self, name: str, part_of: Slice, part: Part) -> float:
        """Milliseconds of computing a piece again, or the activation function without its product."""
        if name != ACTIVATION:
            return self._time(name, part_of, part).forward
        # At the rate of a norm, which reads and writes a residual; and it is a part of the piece fc1.
        moved = self._bytes("fc1 output", part) + self._bytes("activation", part)
        at_rate = self._time("norm1", part_of, part).forward * moved / (2 * self.workload.unit_bytes)
        return min(at_rate, self._time("fc1", part_of, part).forward)

    def context_bytes(self, part_of: Slice) -> int:
        """Bytes on one GPU of a slice's keys and values in one layer, or of their gradients in a message."""
        return int(self.workload.channel_bytes(self.workload.model.key_value_size) * part_of.tokens)

    def context_gradient_bytes(self, part_of: Slice) -> int:
        """Bytes on one GPU of the gradients of a slice's keys and values in one layer, summed up."""
        workload = self.workload
        elements = workload.tokens * workload.model.key_value_size // workload.tensor_parallel
        return int(elements * max(workload.element_bytes, GRADIENT_BYTES) * part_of.tokens)

    def message_bytes(self, names: Iterable[str]) -> int:
        """Bytes of a message on all GPUs of a rank."""
        return sum(self.tensors[name] for name in names) * self.workload.tensor_parallel


@lru_cache(maxsize=32)
def _builder_of(pieces: Pieces) -> _Builder:
    """What many plans of one layout are added up with."""
    return _Builder(pieces)


def whole_layer_cost(pieces: Pieces, recompute: Recompute, layer: int = 0) -> SegmentCost:
    """One layer on one rank, without messages."""
    builder = _builder_of(pieces)
    return builder.segment((builder.shares[layer].of(whole_layer(recompute)),))


class CutLayer(NamedTuple):
    """A layer cut at its attention: what precedes it, attention, what follows it, and what lies between two.

    With a range that has weights, what precedes attention is QKV on its rank, and does not lie between.
    """

    before: SegmentCost
    attention: SegmentCost
    after: SegmentCost
    between: SegmentCost


def cut_layer_cost(pieces: Pieces, recompute: Recompute, attention_range: str) -> CutLayer:
    """One layer cut around an attention range, without messages."""
    if attention_range == "core":
        before, attention, after, *_ = cut("core", recompute)
        between: tuple[Part, ...] = (after, before)
    else:
        _, before, attention, after, *_ = split_cut(attention_range, recompute)
        between = (after,)
    return CutLayer(*map(_builder_of(pieces).segment, ((before,), (attention,), (after,), between)))


class _Shares(NamedTuple):
    """What a layer has of the widest attention and MLP."""

    core: float
    mlp: float

    def of(self, part: Part) -> Part:
        return part._replace(core_share=self.core, mlp_share=self.mlp)


def _shares(workload: Workload, layer: int) -> _Shares:
    model = workload.model
    return _Shares(model.core_share(layer, workload.seq_length), model.mlp_share(layer))


def costs_of_plan(pieces: Pieces, plan: Plan, recompute: Recompute | Sequence[Recompute]) -> Costs:
    """Seconds and bytes of every segment and message of ``plan``, and of each rank's end of the iteration.

    Args:
        pieces: predicted or measured times, with the sizes they are for.
        plan: of any schedule, for the number of layers that the pieces' model has.
        recompute: the same in every layer, or one for each.

    Raises:
        ValueError: the plan is for another number of layers, gives one name to segments whose layers differ,
            or slices sequences that attention sees through windows.
    """
    return Costs(
        segment_costs(pieces, plan, recompute),
        {},
        _message_bytes(_builder_of(pieces), plan),
        pieces.network,
        _rank_costs(pieces, plan),
        _loan_bytes(pieces.workload, plan),
    )


def segment_costs(
    pieces: Pieces, plan: Plan, recompute: Recompute | Sequence[Recompute]
) -> Mapping[str, SegmentCost]:
    """Of :func:`costs_of_plan`, the segments alone: the rest is the same whatever is computed again."""
    layers = pieces.workload.model.num_layers
    if plan.parameters.get("num_layers") != layers:
        raise ValueError(
            f"the plan has {plan.parameters.get('num_layers')} layers, {pieces.workload.model.name} has "
            f"{layers}; plan with --num-layers {layers}"
        )
    if not isinstance(recompute, Recompute) and len(recompute) != layers:
        raise ValueError(f"{len(recompute)} ways of recomputing for {layers} layers; give one for each")
    builder = _builder_of(pieces)
    slices = tuple(_slices(pieces, plan).items())
    cut_at = plan.parameters.get("attention_range")
    level = recompute if isinstance(recompute, Recompute) else tuple(recompute)
    known = plan.segment_names, cut_at, plan.parameters.get(STAGE_LAYERS), slices, level
    if known not in builder.segments:
        levels = (level,) * layers if isinstance(level, Recompute) else level
        build = _helix_segments if _cuts_layers(plan) else _stage_segments
        builder.segments[known] = build(builder, plan, levels, dict(slices))
    return builder.segments[known]


def _message_bytes(builder: _Builder, plan: Plan) -> dict[str, int]:
    """Bytes of every message, by edge and context."""
    slices = _slices(builder.pieces, plan)
    if not _cuts_layers(plan):
        size = builder.message_bytes(("residual",))
        if not plan.micro_batch_names:
            return {ANY_EDGE: size}
        return {
            f"{first}/{kind}->{second}/{kind}": int(size * part_of.tokens)
            for first, second in pairwise(plan.segment_names)
            for kind, part_of in slices.items()
        }
    messages = {}
    crossing = _crossing_bytes(builder, plan)
    for kind, part_of in slices.items():
        suffix = f"/{kind}" if kind else ""
        for (first, second), size in crossing.items():
            messages[f"{first}{suffix}->{second}{suffix}"] = int(size * part_of.tokens)
        if plan.contexts:
            lent = builder.context_bytes(part_of) * builder.workload.tensor_parallel
            messages[f"context{suffix}"] = lent
    return messages


def _cuts_layers(plan: Plan) -> bool:
    """True if segments are cut at attention, False if they are stages of whole layers."""
    return "attention_range" in plan.parameters


def _stage_segments(
    builder: _Builder, plan: Plan, levels: Sequence[Recompute], slices: Mapping[str, Slice]
) -> dict[str, SegmentCost]:
    segments = {}
    for number, (name, own) in enumerate(zip(plan.segment_names, layers_of_stages(plan), strict=True)):
        layers = tuple(builder.shares[layer].of(whole_layer(levels[layer])) for layer in own)
        parts = (_EMBEDDING,) * (number == 0) + layers + (_HEAD,) * (number == plan.num_segments - 1)
        for kind, part_of in slices.items():
            cost = builder.segment(parts, part_of)
            if part_of.end < 1:
                cost = replace(cost, gradient_bytes=builder.context_gradient_bytes(part_of) * len(own))
            segments[f"{name}/{kind}" if kind else name] = cost
    return segments


def _helix_segments(
    builder: _Builder, plan: Plan, levels: Sequence[Recompute], slices: Mapping[str, Slice]
) -> dict[str, SegmentCost]:
    chains = _cut_layers(builder, plan, levels)
    parts: dict[str, list[Part]] = {}
    for name, own in zip(plan.segment_names, chains, strict=True):
        if parts.setdefault(name, own) != own:
            raise ValueError(
                f"segments named {name} differ in what they recompute, in their attention's window or in "
                "their MLP; plan with a kind for each kind of layer"
            )
    segments = {}
    for kind, part_of in slices.items():
        suffix = f"/{kind}" if kind else ""
        for name, own in parts.items():
            segments[name + suffix] = builder.segment(tuple(own), part_of)
            if kind and role_of(name) == "attention":
                segments[name + suffix] = replace(
                    segments[name + suffix],
                    context_bytes=builder.context_bytes(part_of),
                    gradient_bytes=builder.context_gradient_bytes(part_of),
                )
    return segments


def _cut_layers(builder: _Builder, plan: Plan, levels: Sequence[Recompute]) -> list[list[Part]]:
    """What each segment of a plan that cuts layers computes, in their order."""
    attention_range = str(plan.parameters["attention_range"])
    chain: list[list[Part]] = [[_EMBEDDING]]
    for layer, level in enumerate(levels):
        of = builder.shares[layer].of
        if _segments_per_layer(plan) == 3:
            split = split_cut(attention_range, level)
            chain[-1].append(split.pre)
            chain += [[split.qkv], [of(split.attention)], [of(split.post)]]
        else:
            found = cut(attention_range, level)
            chain[-1].append(found.pre)
            chain += [[of(found.attention)], [of(found.post)]]
    chain[-1].append(_HEAD)
    return chain


def _segments_per_layer(plan: Plan) -> int:
    return (plan.num_segments - 1) // _num_layers(plan)


def _crossing_bytes(builder: _Builder, plan: Plan) -> dict[tuple[str, str], int]:
    """Bytes of a whole micro batch's message between two segments that do not always share a rank."""
    found = cut(str(plan.parameters["attention_range"]), Recompute.NONE)
    into, out = builder.message_bytes(found.into), builder.message_bytes(found.out)
    per_layer = _segments_per_layer(plan)
    return {
        names: into if segment % per_layer == 0 else out
        for segment, names in enumerate(pairwise(plan.segment_names))
        if plan.placement[segment] != plan.placement[segment + 1]
    }


def _num_layers(plan: Plan) -> int:
    return int(plan.parameters["num_layers"])


def _slices(pieces: Pieces, plan: Plan) -> dict[str, Slice]:
    """Slices by name of micro batch: those that the plan says, else of equal time.

    An early slice attends to less and so is longer.
    """
    if not plan.micro_batch_names:
        return {"": WHOLE}
    if any(pieces.workload.model.windows):
        raise ValueError(
            "slices of sequences are planned for attention to all tokens before, not for windows"
        )
    kinds = list(dict.fromkeys(plan.micro_batch_names))
    ends = slice_ends(plan)
    if ends is not None:
        return dict(zip(kinds, slices_up_to([end / ends[-1] for end in ends]), strict=True))
    # Where layers are cut, all of a round's forwards run before its backwards.
    cut_sequence = equal_forward_slices if _cuts_layers(plan) else equal_total_slices
    return dict(zip(kinds, cut_sequence(pieces, len(kinds)), strict=True))


def _rank_costs(pieces: Pieces, plan: Plan) -> tuple[RankCost, ...]:
    return tuple(
        RankCost(
            static_bytes=pieces.workload.static_bytes(own)
            + pieces.workload.static_bytes(experts, of_experts=True)
            + borrowed,
            gradient_reduction_ms=pieces.reduction_ms(own) + pieces.reduction_ms(experts, of_experts=True),
            optimizer_ms=pieces.optimizer_ms(own) + pieces.optimizer_ms(experts, of_experts=True),
        )
        for own, experts, borrowed in zip(
            rank_parameters(pieces, plan),
            rank_parameters(pieces, plan, of_experts=True),
            _borrowed_bytes(pieces, plan),
            strict=True,
        )
    )


def _lent_parameters(workload: Workload, plan: Plan) -> dict[str, int]:
    """Matrix weights on one GPU that a loan of a segment moves, by segment name."""
    if not plan.loans:
        return {}
    attention_range = str(plan.parameters["attention_range"])
    pieces = {"core": (), "qkv": ("qkv",), "block": ("qkv", "proj")}[attention_range]
    # With a segment of its own, QKV's weights are lent for that.
    with_core = [piece for piece in pieces if _segments_per_layer(plan) == 2 or piece != "qkv"]
    # Attention is alike in all layers; what follows it in the last layer is lent with the head.
    held = workload.held_parameters(_num_layers(plan) - 1)
    last = held["mlp"] + held["experts"] + (0 if attention_range == "block" else held["proj"])
    lent = {
        "qkv": held["qkv"],
        "attention": sum(held[piece] for piece in with_core),
        "last": last + workload.parameters["head"],
    }
    used = {plan.segment_names[loan.segment] for loan in plan.loans}
    return {name: lent[role_of(name)] for name in dict.fromkeys(plan.segment_names) if name in used}


def _loan_bytes(workload: Workload, plan: Plan) -> dict[str, LoanBytes]:
    """Weights in their own type, gradients in fp32, on all GPUs of a rank."""
    t = workload.tensor_parallel
    return {
        name: LoanBytes(count * workload.element_bytes * t, count * 4 * t)
        for name, count in _lent_parameters(workload, plan).items()
    }


def _borrowed_bytes(pieces: Pieces, plan: Plan) -> list[int]:
    """What each rank holds of others' weights when it has borrowed most: rounds may overlap."""
    workload = pieces.workload
    lent = _lent_parameters(workload, plan)
    sizes = np.array([lent[plan.segment_names[loan.segment]] for loan in plan.loans], dtype=np.int64)
    most = (
        int(np.cumsum(sizes[places] * signs).max(initial=0)) if len(places) else 0
        for places, signs in plan.borrowing
    )
    return [parameters * workload.element_bytes for parameters in most]


def rank_parameters(pieces: Pieces, plan: Plan, *, of_experts: bool = False) -> list[int]:
    """Matrix weights on one GPU of each pipeline rank, or those of experts, which other GPUs hold as well.

    The embedding and the head are where they are used.
    """
    workload = pieces.workload
    counts = workload.parameters
    per_rank = [0] * plan.num_ranks
    if of_experts and workload.model.experts is None:
        return per_rank
    for segment, held in enumerate(_held_by_segments(workload, plan)):
        per_rank[plan.owner_of(segment)] += sum(
            count for piece, count in held if (piece == "experts") == of_experts
        )
    if of_experts:
        return per_rank
    first_rank, last_rank = plan.owner_of(0), plan.owner_of(plan.num_segments - 1)
    per_rank[first_rank] += counts["embedding"]
    if not (workload.model.tied and first_rank == last_rank):
        per_rank[last_rank] += counts["head"]
    return per_rank


def _held_by_segments(workload: Workload, plan: Plan) -> list[list[tuple[str, int]]]:
    """Matrix weights of layers that belong to each segment, by piece; attention's to the one before it."""
    model = workload.model
    with_experts = [model.has_experts(layer) for layer in range(_num_layers(plan))]
    alike = {is_there: with_experts.index(is_there) for is_there in set(with_experts)}
    held_by_kind = {is_there: workload.held_parameters(layer) for is_there, layer in alike.items()}
    layers = [list(held_by_kind[is_there].items()) for is_there in with_experts]
    if not _cuts_layers(plan):
        return [[of_piece for layer in own for of_piece in layers[layer]] for own in layers_of_stages(plan)]
    before = ("qkv", "proj") if plan.parameters["attention_range"] == "block" else ("qkv",)
    held: list[list[tuple[str, int]]] = [[] for _ in range(plan.num_segments)]
    for layer, weights in enumerate(layers):
        first = layer * _segments_per_layer(plan)
        for piece, count in weights:
            held[first if piece in before else first + _segments_per_layer(plan)].append((piece, count))
    return held
