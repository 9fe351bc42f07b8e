"""Elastic helix: sliced helix whose slots hold chunks of documents.

A round's sequences lie end to end, cut where their forwards take equally long. A chunk has the tail of one
sequence, whole ones, and the head of the next. Keys and values of a head are lent to the slots that go on
with it; sequences stay within their round, and rounds follow one another.
"""

from __future__ import annotations

from math import ceil

from helixpipe.elastic.chunks import Chunk
from helixpipe.elastic.costs.chunk_costs import ChunkCosts, PassTime
from helixpipe.elastic.costs.layer_cut import LayerCut
from helixpipe.elastic.round_recipe import RoundRecipe
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.sliced_helix import Round, SlicedRounds
from helixpipe.plan.simulation.costs import ANY_EDGE, Costs, LoanBytes, RankCost, SegmentCost

SCHEDULE = "elastic-helix"
ATTENTION_RANGE = "core"


def round_plan(recipe: RoundRecipe, num_layers: int) -> Plan:
    """The compute-only plan of a recipe: its rounds one after the other, with a spread head."""
    return _rounds_of(recipe, num_layers).plan(
        SCHEDULE,
        {
            "num_layers": num_layers,
            "num_rounds": len(recipe.rounds),
            "attention_range": ATTENTION_RANGE,
            "head_placement": "spread",
        },
        tuple(f"chunk{i}" for i in range(len(recipe.chunks))),
    )


def _rounds(
    num_layers: int, num_ranks: int, members: tuple[Round, ...] = (), slices: tuple[tuple[int, ...], ...] = ()
) -> SlicedRounds:
    return SlicedRounds(
        p=num_ranks,
        num_layers=num_layers,
        rounds=members,
        slices=slices,
        attention_range=ATTENTION_RANGE,
        is_spread=True,
    )


def _rounds_of(recipe: RoundRecipe, num_layers: int) -> SlicedRounds:
    return _rounds(num_layers, len(recipe.rounds[0]), recipe.members, recipe.slices)


def owned_segments(num_layers: int, num_ranks: int, rank: int) -> list[int]:
    """The segments between attentions whose weights are on ``rank``, whatever batches hold."""
    rounds = _rounds(num_layers, num_ranks)
    return [
        segment for segment in range(0, rounds.last + 1, rounds.per_layer) if rounds.owner_of(segment) == rank
    ]


def costs_of_rounds(recipe: RoundRecipe, num_layers: int, costs: ChunkCosts) -> Costs:
    """What the operations and messages of a recipe's plan cost, recomputation included.

    Raises:
        ValueError: the costs do not say how a layer's fall to its parts.
    """
    cut = cut_of(costs)
    ranks = len(recipe.rounds[0])
    segments: dict[str, SegmentCost] = {}
    messages: dict[str, int] = {}
    # The same in every layer.
    lent = {i for context in _rounds_of(recipe, 1).contexts(is_resent=False) for i in context.lent}
    for i, chunk in enumerate(recipe.chunks):
        of = _ChunkCost(chunk, costs, cut, recipe.recompute)
        name = f"chunk{i}"
        between = {"middle": of.middle()} if num_layers > 1 else {}
        roles = {"first": of.first(), "attention": of.attention(), **between, "last": of.last()}
        segments |= {f"{role}/{name}": cost for role, cost in roles.items()}
        if ranks > 1:
            for role in ("first", *between):
                messages[f"{role}/{name}->attention/{name}"] = of.bytes_of(cut.into_bytes)
            for role in between:
                messages[f"attention/{name}->{role}/{name}"] = of.bytes_of(cut.out_bytes)
        if i in lent:
            messages[f"context/{name}"] = ceil(costs.kv_bytes * chunk.continued_tokens)
    static = _static_bytes(costs, cut, ranks, num_layers)
    if costs.network is None:
        return Costs(segments, {ANY_EDGE: 0.0}, ranks=static)
    head = {"last": LoanBytes(cut.lent_weight_bytes, cut.lent_gradient_bytes)} if ranks > 1 else {}
    return Costs(segments, {}, messages, costs.network, static, head)


def cut_of(costs: ChunkCosts) -> LayerCut:
    """How a layer's costs fall to its parts; ``ValueError`` if the costs do not say it."""
    if costs.cut is None:
        raise ValueError(
            "the costs do not say how a layer's fall to attention and the rest, which elastic helix cuts "
            'apart: they have no "cut"; make them anew with elastic-costs or elastic-profile'
        )
    return costs.cut


def _static_bytes(costs: ChunkCosts, cut: LayerCut, ranks: int, num_layers: int) -> tuple[RankCost, ...]:
    """Layers are dealt in turn; both ends of the model are on rank 0, and the others borrow its last part."""
    own = num_layers // ranks
    others = own * costs.layer_state_bytes + ceil(cut.lent_weight_bytes / costs.tensor_parallel)
    return tuple(
        RankCost(others if rank else costs.state_bytes(0, num_stages=1, num_layers=own))
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

    def first(self) -> SegmentCost:
        """What precedes attention; the embedding's time is left out, as in stages."""
        level = self.level
        return self._linear(before=True, after=False, per_token=level.before_bytes, again=level.before_again)

    def middle(self) -> SegmentCost:
        """What follows the attention of one layer, and precedes that of the next."""
        level = self.level
        kept, again = level.after_bytes + level.before_bytes, level.after_again + level.before_again
        return self._linear(before=True, after=True, per_token=kept, again=again)

    def last(self) -> SegmentCost:
        """What follows the last attention, and the head."""
        level, costs = self.level, self.costs
        kept = level.after_bytes + costs.logits_bytes
        found = self._linear(before=False, after=True, per_token=kept, again=level.after_again)
        head = [costs.head_ms(time, self.chunk) for time in (costs.forward, costs.backward)]
        return SegmentCost(
            forward=found.forward + head[0],
            backward=found.backward + head[1],
            recompute=found.recompute,
            bytes=found.bytes,
            workspace_bytes=max(found.workspace_bytes, self._on_each(costs.head_workspace_bytes)),
        )

    def attention(self) -> SegmentCost:
        """Attention, which keeps its inputs and output, and keys and values for the chunks that go on."""
        costs, chunk = self.costs, self.chunk
        area = costs.padded_area(chunk)
        forward, backward = (
            time.attention_ms * area / costs.tensor_parallel + self.cut.operation_ms
            for time in (costs.forward, costs.backward)
        )
        lent = costs.kv_bytes * chunk.continued_tokens / costs.tensor_parallel
        return SegmentCost(
            forward,
            backward,
            bytes=self._on_each(self.level.attention_bytes),
            context_bytes=ceil(lent),
            gradient_bytes=costs.gradient_bytes(chunk, 1),
        )

    def bytes_of(self, per_token: float) -> int:
        """Of all tokens, on all GPUs of a rank."""
        return ceil(per_token * self.tokens)

    def _linear(self, *, before: bool, after: bool, per_token: float, again: float) -> SegmentCost:
        """Parts of a layer without attention, of which the backward repeats so much of the forward."""
        costs, cut = self.costs, self.cut
        shares = [before * share + after * (1 - share) for share in (cut.forward_before, cut.backward_before)]
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
