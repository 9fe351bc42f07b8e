"""1F1B over chunks, as a plan of the common form (InfiniPipe, arXiv 2509.21275, section 4.4)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

from helixpipe.elastic.chunks import Chunk
from helixpipe.elastic.costs.chunk_costs import ChunkCosts
from helixpipe.elastic.recipe import Recipe
from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.one_f_one_b import one_forward_one_backward
from helixpipe.plan.simulation.costs import ANY_EDGE, Costs, RankCost, SegmentCost
from helixpipe.plan.stage_layers import STAGE_LAYERS, spell_stage_layers

SCHEDULE = "elastic"


def order_chunks(chunks: Sequence[Chunk], costs: ChunkCosts) -> tuple[Chunk, ...]:
    """Chunks in the order of their forwards: sequences with more slices first, then the slower ones.

    So pipelines hold sequences of like numbers of slices, and the last chunks to drain are the smallest.
    """
    groups: dict[tuple[bool, int], list[Chunk]] = {}
    for chunk in chunks:
        sequence = chunk.sliced_sequence
        key = (False, chunk.pieces[0].sequence) if sequence is None else (True, sequence)
        groups.setdefault(key, []).append(chunk)
    ordered = sorted(
        groups.values(),
        key=lambda group: (
            -len(group),
            -sum(costs.layer_ms(chunk.area, chunk.tokens) for chunk in group),
            group[0].pieces[0].sequence,
        ),
    )
    return tuple(chunk for group in ordered for chunk in group)


def sequence_groups(chunks: Sequence[Chunk]) -> list[int]:
    """Number of chunks of each group, in order: the slices of a sequence, or one batched chunk."""
    keys = [
        (chunk.sliced_sequence, -1) if chunk.sliced_sequence is not None else (None, index)
        for index, chunk in enumerate(chunks)
    ]
    return [len(list(members)) for _, members in groupby(keys)]


def backward_order(groups: Sequence[int], first: int = 0) -> list[int]:
    """Chunks in the order of their backwards: groups in order, the slices of each in reverse."""
    order: list[int] = []
    for size in groups:
        order += range(first + size - 1, first - 1, -1)
        first += size
    return order


def in_flight(stage: int, num_stages: int, groups: Sequence[int]) -> int:
    """``W_q``: chunks whose activations a stage (from 0) holds in the steady state of a pipeline."""
    return num_stages - stage - 1 + max(groups)


def elastic_plan(recipe: Recipe, num_layers: int) -> Plan:
    """The compute-only plan of a recipe: its pipelines back to back, each 1F1B over its chunks."""
    num_stages, count = len(recipe.checkpointed), len(recipe.chunks)
    uneven = {STAGE_LAYERS: spell_stage_layers(recipe.stage_layers)} if recipe.stage_layers else {}
    orders: list[list[Operation]] = [[] for _ in range(num_stages)]
    for members in recipe.ranges:
        groups = sequence_groups([recipe.chunks[i] for i in members])
        backwards = backward_order(groups, members.start)
        for stage, order in enumerate(orders):
            order += one_forward_one_backward(
                [Operation(stage, Kind.F, i) for i in members],
                [Operation(stage, Kind.B, i) for i in backwards],
                warmup=in_flight(stage, num_stages, groups) - 1,
            )
    return Plan(
        schedule=SCHEDULE,
        num_ranks=num_stages,
        num_microbatches=count,
        segment_names=tuple(f"stage{stage}" for stage in range(num_stages)),
        placement=tuple((stage,) * count for stage in range(num_stages)),
        orders=tuple(tuple(order) for order in orders),
        parameters={"num_layers": num_layers, "num_pipelines": len(recipe.pipelines), **uneven},
        micro_batch_names=tuple(f"chunk{i}" for i in range(count)),
        slices=recipe.slices,
    )


def costs_of_recipe(recipe: Recipe, num_layers: int, costs: ChunkCosts) -> Costs:
    """What the operations and messages of a recipe's plan cost, recomputation included."""
    num_stages = len(recipe.checkpointed)
    layers = recipe.layers_by_stage(num_layers)
    segments = {
        f"stage{stage}/chunk{i}": stage_cost(
            chunk, costs, layers[stage], recipe.checkpointed[stage][i], is_last=stage == num_stages - 1
        )
        for stage in range(num_stages)
        for i, chunk in enumerate(recipe.chunks)
    }
    messages = {
        f"stage{first}/chunk{i}->stage{second}/chunk{i}": costs.message_bytes(chunk)
        for first, second in pairwise(range(num_stages))
        for i, chunk in enumerate(recipe.chunks)
    }
    ranks = tuple(RankCost(costs.state_bytes(q, num_stages, layers[q])) for q in range(num_stages))
    if costs.network is None:
        return Costs(segments, {ANY_EDGE: 0.0}, ranks=ranks)
    return Costs(segments, {}, messages, costs.network, ranks)


def stage_cost(
    chunk: Chunk, costs: ChunkCosts, num_layers: int, checkpointed: int, *, is_last: bool
) -> SegmentCost:
    """One chunk on a stage of ``num_layers`` layers, ``checkpointed`` of which keep only their input."""
    recompute = checkpointed * costs.recompute_ms(chunk)
    whole = costs.activation_bytes(chunk, num_layers, is_last=is_last)
    return SegmentCost(
        forward=costs.forward_ms(chunk, num_layers, is_last=is_last),
        backward=costs.backward_ms(chunk, num_layers, is_last=is_last) + recompute,
        recompute=recompute,
        bytes=whole - checkpointed * costs.saved_bytes(chunk),
        workspace_bytes=costs.workspace_bytes(chunk, is_last=is_last, recomputes=checkpointed > 0),
        gradient_bytes=costs.gradient_bytes(chunk, num_layers),
    )
