"""From pieces to a plan's segments: times, kept bytes and messages under each way of recomputing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

from helixpipe.plan.cost_model.pieces import PieceCost, Pieces
from helixpipe.plan.cost_model.work import LAYER_PIECES, Workload
from helixpipe.plan.equal_time import equal_time_end
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.costs import ANY_EDGE, Costs, LoanBytes, RankCost, SegmentCost


class Recompute(str, Enum):
    """What a backward computes again instead of having kept it.

    ``SELECTIVE`` is Megatron's core attention; ``WITHOUT_ATTENTION`` is what is cheap: attention's output
    and log-sum-exp are kept (HelixPipe); ``FULL`` keeps only a segment's or layer's input.
    """

    NONE = "none"
    SELECTIVE = "selective"
    WITHOUT_ATTENTION = "without-attention"
    FULL = "full"


class _Part(NamedTuple):
    """A run of pieces on one rank: what its forward keeps and its backward recomputes."""

    pieces: tuple[str, ...]
    kept: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()


_MLP_KEPT = ("norm2 input", "norm2 output", "fc1 output", "activation")
_ATTENTION_KEPT = ("norm1 input", "norm1 output", "qkv", "attention output", "log-sum-exp")


def _without(names: Iterable[str], *left_out: str) -> tuple[str, ...]:
    return tuple(name for name in names if name not in left_out)


def _whole_layer(recompute: Recompute) -> _Part:
    if recompute is Recompute.FULL:
        return _Part(LAYER_PIECES, ("norm1 input",), LAYER_PIECES)
    if recompute is Recompute.WITHOUT_ATTENTION:
        kept = ("norm1 input", "attention output", "log-sum-exp", "norm2 input")
        return _Part(LAYER_PIECES, kept, ("norm1", "qkv", "norm2", "fc1"))
    if recompute is Recompute.SELECTIVE:
        return _Part(LAYER_PIECES, _without(_ATTENTION_KEPT, "log-sum-exp") + _MLP_KEPT, ("core",))
    return _Part(LAYER_PIECES, _ATTENTION_KEPT + _MLP_KEPT)


class _Cut(NamedTuple):
    """A layer cut around its attention range, and the tensors that cross the two cuts."""

    pre: _Part
    attention: _Part
    post: _Part
    into: tuple[str, ...]
    out: tuple[str, ...]


def _cut(attention_range: str, recompute: Recompute) -> _Cut:
    return {"core": _cut_core, "qkv": _cut_qkv, "block": _cut_block}[attention_range](recompute)


def _cut_core(recompute: Recompute) -> _Cut:
    # The residual passes by attention in the same message, which is cut off behind the rest afterwards.
    kept: tuple[str, ...] = ("qkv", "attention output", "log-sum-exp")
    again: tuple[str, ...] = ()
    if recompute in (Recompute.SELECTIVE, Recompute.FULL):
        kept, again = ("qkv",), ("core",)
    pre = {
        Recompute.WITHOUT_ATTENTION: _Part(("norm1", "qkv"), ("norm1 input",), ("norm1",)),
        Recompute.FULL: _Part(("norm1", "qkv"), (), ("norm1", "qkv")),
    }.get(recompute, _Part(("norm1", "qkv"), ("norm1 input", "norm1 output")))
    attention = _Part(("core",), kept, again)
    return _Cut(pre, attention, _post(recompute), ("qkv", "residual"), ("attention output", "residual"))


def _cut_qkv(recompute: Recompute) -> _Cut:
    attention = _attention_with_weights(("norm1", "qkv", "core"), recompute)
    return _Cut(_Part(()), attention, _post(recompute), ("norm1 input",), ("attention output", "residual"))


def _cut_block(recompute: Recompute) -> _Cut:
    mlp = ("norm2", "fc1", "fc2")
    post = {
        Recompute.WITHOUT_ATTENTION: _Part(mlp, ("norm2 input",), ("norm2", "fc1")),
        Recompute.FULL: _Part(mlp, ("norm2 input",), mlp),
    }.get(recompute, _Part(mlp, _MLP_KEPT))
    attention = _attention_with_weights(("norm1", "qkv", "core", "proj"), recompute)
    return _Cut(_Part(()), attention, post, ("norm1 input",), ("norm2 input",))


def _attention_with_weights(pieces: tuple[str, ...], recompute: Recompute) -> _Part:
    """An attention segment that starts from the hidden state, with weights that it may have borrowed."""
    return {
        Recompute.NONE: _Part(pieces, _ATTENTION_KEPT),
        Recompute.SELECTIVE: _Part(pieces, _without(_ATTENTION_KEPT, "log-sum-exp"), ("core",)),
        Recompute.WITHOUT_ATTENTION: _Part(
            pieces, ("norm1 input", "attention output", "log-sum-exp"), ("norm1", "qkv")
        ),
        Recompute.FULL: _Part(pieces, ("norm1 input",), pieces),
    }[recompute]


def _post(recompute: Recompute) -> _Part:
    pieces = ("proj", "norm2", "fc1", "fc2")
    if recompute is Recompute.FULL:
        return _Part(pieces, ("attention output", "residual"), pieces)
    if recompute is Recompute.WITHOUT_ATTENTION:
        return _Part(pieces, ("attention output", "norm2 input"), ("norm2", "fc1"))
    return _Part(pieces, ("attention output", *_MLP_KEPT))


# Inputs of matrix products and gradients of their outputs: what weight gradients are computed from.
_FOR_WEIGHT: Mapping[str, tuple[str, ...]] = {
    "qkv": ("norm1 output", "qkv"),
    "proj": ("attention output", "residual"),
    "fc1": ("norm2 output", "fc1 output"),
    "fc2": ("activation", "residual"),
}


@dataclass(frozen=True)
class _Slice:
    """A share of the sequence's tokens, and of the attention's triangle."""

    tokens: float = 1.0
    area: float = 1.0


_WHOLE = _Slice()


class _Builder:
    """Adds parts up to segments for one choice of recomputation."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.workload = pieces.workload
        self.tensors = self.workload.kept_tensors

    def segment(self, parts: Sequence[_Part], part_of: _Slice = _WHOLE) -> SegmentCost:
        """The cost of parts that run on one rank, one after the other."""
        names = [piece for part in parts for piece in part.pieces]
        again = [piece for part in parts for piece in part.recomputed]
        if "head" in names and not self.workload.whole_logits:
            # A loss in chunks computes each chunk's logits again in the backward pass.
            again.append("head")
        costs = [self._time(piece, part_of) for piece in names]
        recompute = sum(self._time(piece, part_of).forward for piece in again)
        overhead = self.pieces.overhead_ms
        kept = sum(self.tensors[name] for part in parts for name in part.kept)
        for_weight = sum(self.tensors[n] for piece in names for n in _FOR_WEIGHT.get(piece, ()))
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

    def _workspace(self, parts: Sequence[_Part], names: list[str]) -> int:
        workspace = self.workload.layer_workspace_bytes if "fc1" in names else 0
        # What was not kept exists again while its layer is computed backward.
        again = {piece for part in parts for piece in part.recomputed}
        regained = {"norm1": "norm1 output", "qkv": "qkv", "core": "attention output", "proj": "norm2 input"}
        regained |= {"norm2": "norm2 output", "fc1": "fc1 output"}
        workspace += sum(self.tensors[name] for piece, name in regained.items() if piece in again)
        if "fc1" in again:
            workspace += self.tensors["activation"]
        return max(workspace, self.workload.head_workspace_bytes if "head" in names else 0)

    def _time(self, piece: str, part_of: _Slice) -> PieceCost:
        cost = self.pieces.times[piece]
        share = part_of.area if piece == "core" else part_of.tokens
        return PieceCost(cost.forward * share, cost.backward * share, cost.weight * share)

    def message_bytes(self, names: Iterable[str]) -> int:
        """Bytes of a message on all GPUs of a rank."""
        return sum(self.tensors[name] for name in names) * self.workload.tensor_parallel


def whole_layer_cost(pieces: Pieces, recompute: Recompute) -> SegmentCost:
    """One layer on one rank."""
    return _Builder(pieces).segment([_whole_layer(recompute)])


_EMBEDDING, _HEAD = _Part(("embedding",)), _Part(("head",))


def costs_of_plan(pieces: Pieces, plan: Plan, recompute: Recompute) -> Costs:
    """Seconds and bytes of every segment and message of ``plan``, and of each rank's end of the iteration.

    Args:
        pieces: predicted or measured times, with the sizes they are for.
        plan: of any schedule, for the number of layers that the pieces' model has.
        recompute: the same in every layer.

    Raises:
        ValueError: the plan is for another number of layers.
    """
    layers = pieces.workload.model.num_layers
    if plan.parameters.get("num_layers") != layers:
        raise ValueError(
            f"the plan has {plan.parameters.get('num_layers')} layers, {pieces.workload.model.name} has "
            f"{layers}; plan with --num-layers {layers}"
        )
    builder = _Builder(pieces)
    build = _helix_costs if "attention" in plan.segment_names else _stage_costs
    segments, messages = build(builder, plan, recompute)
    return Costs(
        segments,
        {},
        messages,
        pieces.network,
        _rank_costs(pieces, plan),
        _loan_bytes(pieces.workload, plan),
    )


def _stage_costs(
    builder: _Builder, plan: Plan, recompute: Recompute
) -> tuple[dict[str, SegmentCost], dict[str, int]]:
    layers = [_whole_layer(recompute)] * (_num_layers(plan) // plan.num_segments)
    slices = _slices(builder.pieces, plan)
    segments = {}
    for number, name in enumerate(plan.segment_names):
        parts = [_EMBEDDING] * (number == 0) + layers + [_HEAD] * (number == plan.num_segments - 1)
        for kind, part_of in slices.items():
            segments[f"{name}/{kind}" if kind else name] = builder.segment(parts, part_of)
    size = builder.message_bytes(("residual",))
    if not plan.micro_batch_names:
        return segments, {ANY_EDGE: size}
    names = plan.segment_names
    return segments, {
        f"{first}/{kind}->{second}/{kind}": int(size * part_of.tokens)
        for first, second in pairwise(names)
        for kind, part_of in slices.items()
    }


def _helix_costs(
    builder: _Builder, plan: Plan, recompute: Recompute
) -> tuple[dict[str, SegmentCost], dict[str, int]]:
    attention_range = str(plan.parameters["attention_range"])
    cut = _cut(attention_range, recompute)
    segments = {
        "first": builder.segment([_EMBEDDING, cut.pre]),
        "attention": builder.segment([cut.attention]),
        "middle": builder.segment([cut.post, cut.pre]),
        "last": builder.segment([cut.post, _HEAD]),
    }
    into, out = builder.message_bytes(cut.into), builder.message_bytes(cut.out)
    messages = {f"{name}->attention": into for name in ("first", "middle")}
    messages |= {f"attention->{name}": out for name in ("middle", "last")}
    return {name: segments[name] for name in plan.cost_names}, messages


def _num_layers(plan: Plan) -> int:
    return int(plan.parameters["num_layers"])


def _slices(pieces: Pieces, plan: Plan) -> dict[str, _Slice]:
    """Slices of equal time by name of micro batch: an early slice attends to less and so is longer.

    With x the share of tokens up to a cut, the time up to it is a x + c x^2.
    """
    if not plan.micro_batch_names:
        return {"": _WHOLE}
    kinds = list(dict.fromkeys(plan.micro_batch_names))
    core = pieces.times["core"].total
    linear = sum(pieces.times[piece].total for piece in LAYER_PIECES) - core
    count = len(kinds)
    cuts = [equal_time_end((linear + core) * j / count, linear, core) for j in range(count + 1)]
    return {
        kind: _Slice(tokens=end - start, area=end * end - start * start)
        for kind, start, end in zip(kinds, cuts[:-1], cuts[1:], strict=True)
    }


def _rank_costs(pieces: Pieces, plan: Plan) -> tuple[RankCost, ...]:
    return tuple(
        RankCost(
            static_bytes=pieces.workload.static_bytes(parameters) + borrowed,
            gradient_reduction_ms=pieces.reduction_ms(parameters),
            optimizer_ms=pieces.optimizer_ms(parameters),
        )
        for parameters, borrowed in zip(
            rank_parameters(pieces, plan), _borrowed_bytes(pieces, plan), strict=True
        )
    )


def _lent_parameters(workload: Workload, plan: Plan) -> dict[str, int]:
    """Matrix weights on one GPU that a loan of a segment moves, by segment name."""
    if not plan.loans:
        return {}
    attention_range = str(plan.parameters["attention_range"])
    pieces = {"core": (), "qkv": ("qkv",), "block": ("qkv", "proj")}[attention_range]
    lent = {
        "attention": sum(workload.parameters[piece] for piece in pieces),
        "last": _helix_shares(workload, plan)["last"] + workload.parameters["head"],
    }
    used = {plan.segment_names[loan.segment] for loan in plan.loans}
    return {name: count for name, count in lent.items() if name in used}


def _loan_bytes(workload: Workload, plan: Plan) -> dict[str, LoanBytes]:
    """Weights in their own type, gradients in fp32, on all GPUs of a rank."""
    t = workload.tensor_parallel
    return {
        name: LoanBytes(count * workload.element_bytes * t, count * 4 * t)
        for name, count in _lent_parameters(workload, plan).items()
    }


def _borrowed_bytes(pieces: Pieces, plan: Plan) -> list[int]:
    """What each rank holds of others' weights when forward turns into backward: all loans of a round."""
    held = [0] * plan.num_ranks
    if not plan.loans:
        return held
    workload = pieces.workload
    lent = _lent_parameters(workload, plan)
    round_size = plan.num_ranks * int(plan.parameters["num_fold"])
    for loan in plan.loans:
        if loan.micro_batches[0] < round_size:
            held[loan.borrower] += lent[plan.segment_names[loan.segment]] * workload.element_bytes
    return held


def _helix_shares(workload: Workload, plan: Plan) -> dict[str, int]:
    """Matrix weights of layers that belong to each kind of segment; attention's to the one before it."""
    counts = workload.parameters
    is_block = plan.parameters["attention_range"] == "block"
    before = counts["qkv"] + (counts["proj"] if is_block else 0)
    after = counts["fc1"] + counts["fc2"] + (0 if is_block else counts["proj"])
    return {"first": before, "attention": 0, "middle": after + before, "last": after}


def rank_parameters(pieces: Pieces, plan: Plan) -> list[int]:
    """Matrix weights on one GPU of each pipeline rank, the embedding and the head where they are used."""
    counts = pieces.workload.parameters
    per_rank = [0] * plan.num_ranks
    last = plan.num_segments - 1
    if "attention" in plan.segment_names:
        shares = _helix_shares(pieces.workload, plan)
        for segment, name in enumerate(plan.segment_names):
            per_rank[plan.owner_of(segment)] += shares[name]
    else:
        layer = sum(counts[piece] for piece in ("qkv", "proj", "fc1", "fc2"))
        for segment in range(plan.num_segments):
            per_rank[plan.rank_of(segment, 0)] += layer * (_num_layers(plan) // plan.num_segments)
    first_rank, last_rank = plan.owner_of(0), plan.owner_of(last)
    per_rank[first_rank] += counts["embedding"]
    if not (pieces.workload.model.tied and first_rank == last_rank):
        per_rank[last_rank] += counts["head"]
    return per_rank
