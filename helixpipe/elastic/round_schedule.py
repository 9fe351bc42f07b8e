"""Elastic helix: sliced helix whose slots hold chunks of documents.

A round's sequences lie end to end, cut where their forwards take equally long. A chunk has the tail of one
sequence, whole ones, and the head of the next. Keys and values of a head are lent to the slots that go on
with it; sequences stay within their round, and rounds follow one another.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from helixpipe.elastic.chunks import Chunk
from helixpipe.elastic.costs.chunk_costs import ChunkCosts, PassTime
from helixpipe.elastic.costs.layer_cut import LayerCut
from helixpipe.elastic.round_recipe import RoundRecipe
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.sliced_helix import Round, SlicedRounds
from helixpipe.plan.simulation.costs import ANY_EDGE, Costs, LoanBytes, RankCost, SegmentCost

SCHEDULE = "elastic-helix"


def round_plan(recipe: RoundRecipe, num_layers: int) -> Plan:
    """The compute-only plan of a recipe: its rounds one after the other, with a spread head."""
    return _rounds_of(recipe, num_layers).plan(
        SCHEDULE,
        {
            "num_layers": num_layers,
            "num_rounds": len(recipe.rounds),
            "attention_range": recipe.attention_range,
            "head_placement": "spread",
        },
        tuple(f"chunk{i}" for i in range(len(recipe.chunks))),
    )


def _rounds(
    num_layers: int,
    num_ranks: int,
    attention_range: str,
    members: tuple[Round, ...] = (),
    slices: tuple[tuple[int, ...], ...] = (),
) -> SlicedRounds:
    return SlicedRounds(
        p=num_ranks,
        num_layers=num_layers,
        rounds=members,
        slices=slices,
        attention_range=attention_range,
        is_spread=True,
    )


def _rounds_of(recipe: RoundRecipe, num_layers: int) -> SlicedRounds:
    ranks = len(recipe.rounds[0])
    return _rounds(num_layers, ranks, recipe.attention_range, recipe.members, recipe.slices)


def owned_segments(num_layers: int, num_ranks: int, rank: int, attention_range: str) -> list[int]:
    """The segments between attentions whose weights are on ``rank``, whatever batches hold."""
    rounds = _rounds(num_layers, num_ranks, attention_range)
    return [
        segment for segment in range(0, rounds.last + 1, rounds.per_layer) if rounds.owner_of(segment) == rank
    ]


def costs_of_rounds(recipe: RoundRecipe, num_layers: int, costs: ChunkCosts) -> Costs:
    """What the operations and messages of a recipe's plan cost, recomputation included.

    Raises:
        ValueError: the costs do not say how a layer's fall to its parts.
    """
    cut = cut_of(costs, recipe.attention_range)
    ranks = len(recipe.rounds[0])
    segments: dict[str, SegmentCost] = {}
    messages: dict[str, int] = {}
    # The same in every layer.
    lent = {i for context in _rounds_of(recipe, 1).contexts(is_resent=False) for i in context.lent}
    between = ("middle",) if num_layers > 1 else ()
    behind = "qkv" if cut.has_weights else "attention"
    for i, chunk in enumerate(recipe.chunks):
        of = _ChunkCost(chunk, costs, cut, recipe.recompute)
        name = f"chunk{i}"
        roles = of.segments()
        segments |= {f"{role}/{name}": cost for role, cost in roles.items() if role != "middle" or between}
        if ranks > 1:
            for role in ("first", *between):
                messages[f"{role}/{name}->{behind}/{name}"] = of.bytes_of(cut.into_bytes)
            for role in between:
                messages[f"attention/{name}->{role}/{name}"] = of.bytes_of(cut.out_bytes)
        if i in lent:
            messages[f"context/{name}"] = ceil(costs.kv_bytes * chunk.continued_tokens)
    static = _static_bytes(costs, cut, ranks, num_layers)
    if costs.network is None:
        return Costs(segments, {ANY_EDGE: 0.0}, ranks=static)
    return Costs(segments, {}, messages, costs.network, static, _loan_bytes(cut) if ranks > 1 else {})


def cut_of(costs: ChunkCosts, attention_range: str) -> LayerCut:
    """How a layer's costs fall to its parts; ``ValueError`` if the costs do not say it."""
    if costs.cut is None:
        raise ValueError(
            "the costs do not say how a layer's fall to attention and the rest, which elastic helix cuts "
            'apart: they have no "cut"; make them anew with elastic-costs or elastic-profile'
        )
    cuts = {cut.attention_range: cut for cut in (costs.cut, *costs.cuts_with_weights)}
    if attention_range not in cuts:
        raise ValueError(
            f"the costs do not know the attention range {attention_range}, only {', '.join(cuts)}; make them "
            "anew with elastic-costs or elastic-profile"
        )
    return cuts[attention_range]


def known_ranges(costs: ChunkCosts) -> list[str]:
    """Attention ranges that the costs know; none for costs of whole layers alone."""
    return [cut.attention_range for cut in (costs.cut, *costs.cuts_with_weights) if cut is not None]


def _loan_bytes(cut: LayerCut) -> dict[str, LoanBytes]:
    """Of the segments whose weights are lent."""
    found = {
        "qkv": LoanBytes(cut.qkv_weight_bytes, cut.qkv_gradient_bytes),
        "attention": LoanBytes(cut.projection_weight_bytes, cut.projection_gradient_bytes),
        "last": LoanBytes(cut.lent_weight_bytes, cut.lent_gradient_bytes),
    }
    return {name: size for name, size in found.items() if name == "last" or size.weights}


def _static_bytes(costs: ChunkCosts, cut: LayerCut, ranks: int, num_layers: int) -> tuple[RankCost, ...]:
    """Layers are dealt in turn; both ends of the model are on rank 0, and the others borrow its last part.

    At the turn of a round a rank has borrowed what attention needs of all layers but its own.
    """
    own = num_layers // ranks
    per_layer = ceil((cut.qkv_weight_bytes + cut.projection_weight_bytes) / costs.tensor_parallel)
    of_attention = (num_layers - own) * per_layer
    others = own * costs.layer_state_bytes + ceil(cut.lent_weight_bytes / costs.tensor_parallel)
    return tuple(
        RankCost(of_attention + (others if rank else costs.state_bytes(0, num_stages=1, num_layers=own)))
        for rank in range(ranks)
    )


class _ChunkCost:
    """The segments of one chunk."""

    def __init__(self, chunk: Chunk, costs: ChunkCosts, cut: LayerCut, recompute: str) -> None:
        self.chunk = chunk
        self.costs = costs
        self.cut = cut
        self.level = cut.level(recompute)
        self.tokens = costs.padded(chunk)

    def segments(self) -> dict[str, SegmentCost]:
        """By role; the embedding's time is left out, as in stages."""
        level = self.level
        if self.cut.has_weights:
            before = replace(self._before(), workspace_bytes=self._on_each(level.before_workspace_bytes))
            ms = self.cut.operation_ms
            roles = {"first": SegmentCost(ms, ms), "qkv": before, "middle": self._after()}
        else:
            kept, again = level.after_bytes + level.before_bytes, level.after_again + level.before_again
            middle = self._linear(before=True, after=True, per_token=kept, again=again)
            roles = {"first": self._before(), "middle": middle}
        return {**roles, "attention": self._attention(), "last": self._last()}

    def _before(self) -> SegmentCost:
        """What precedes attention."""
        level = self.level
        return self._linear(before=True, after=False, per_token=level.before_bytes, again=level.before_again)

    def _after(self) -> SegmentCost:
        """What follows attention."""
        level = self.level
        return self._linear(before=False, after=True, per_token=level.after_bytes, again=level.after_again)

    def _last(self) -> SegmentCost:
        """What follows the last attention, and the head."""
        costs, found = self.costs, self._after()
        head = [costs.head_ms(time, self.chunk) for time in (costs.forward, costs.backward)]
        return SegmentCost(
            forward=found.forward + head[0],
            backward=found.backward + head[1],
            recompute=found.recompute,
            bytes=found.bytes + self._on_each(costs.logits_bytes),
            workspace_bytes=max(found.workspace_bytes, self._on_each(costs.head_workspace_bytes)),
        )

    def _attention(self) -> SegmentCost:
        """Attention, which keeps its inputs and output, and keys and values for the chunks that go on."""
        costs, chunk = self.costs, self.chunk
        area = costs.padded_area(chunk)
        cut = self.cut
        forward, backward = (
            time.attention_ms * area / costs.tensor_parallel
            + share * self._linear_ms(time)
            + cut.operation_ms
            for time, share in ((costs.forward, cut.forward_with), (costs.backward, cut.backward_with))
        )
        lent = costs.kv_bytes * chunk.continued_tokens / costs.tensor_parallel
        return SegmentCost(
            forward,
            backward,
            bytes=self._on_each(self.level.attention_bytes),
            workspace_bytes=self._on_each(self.level.attention_workspace_bytes),
            context_bytes=ceil(lent),
            gradient_bytes=costs.gradient_bytes(chunk, 1),
        )

    def bytes_of(self, per_token: float) -> int:
        """Of all tokens, on all GPUs of a rank."""
        return ceil(per_token * self.tokens)

    def _linear(self, *, before: bool, after: bool, per_token: float, again: float) -> SegmentCost:
        """Parts of a layer without attention, of which the backward repeats so much of the forward."""
        costs, cut = self.costs, self.cut
        shares = [
            before * share + after * (1 - share - beside)
            for share, beside in (
                (cut.forward_before, cut.forward_with),
                (cut.backward_before, cut.backward_with),
            )
        ]
        forward, backward = (self._linear_ms(time) for time in (costs.forward, costs.backward))
        recompute = again * forward
        return SegmentCost(
            forward=shares[0] * forward + cut.operation_ms,
            backward=shares[1] * backward + recompute + cut.operation_ms,
            recompute=recompute,
            bytes=self._on_each(per_token),
            workspace_bytes=self._on_each(self.level.workspace_bytes),
        )

    def _linear_ms(self, time: PassTime) -> float:
        """Of a layer, all but attention."""
        return time.layer_time(0, self.tokens, self.costs.tensor_parallel)

    def _on_each(self, per_token: float) -> int:
        return ceil(per_token * self.tokens / self.costs.tensor_parallel)
