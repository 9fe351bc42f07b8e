"""Plans of forward passes alone: nothing is kept for a backward, so nothing has to be solved."""

from __future__ import annotations

from collections.abc import Sequence

from helixpipe.elastic import round_schedule
from helixpipe.elastic.chunk_schedule import costs_of_recipe, elastic_plan, order_chunks
from helixpipe.elastic.chunks import Chunk
from helixpipe.elastic.job import ElasticJob, check_lengths
from helixpipe.elastic.recipe import BatchRecipe, Recipe
from helixpipe.elastic.search.planner import SLICE_COUNTS, by_size, chunk_batch, nothing_checkpointed
from helixpipe.elastic.search.round_planner import most_rounds
from helixpipe.elastic.search.rounds import make_rounds
from helixpipe.elastic.search.sequence_processor import equal_time_mesh
from helixpipe.plan.schedules.helix import DEFAULT_ATTENTION_RANGE
from helixpipe.plan.simulation.simulate import simulate


def plan_evaluation(
    lengths: Sequence[int], job: ElasticJob, *, slice_counts: Sequence[int] = SLICE_COUNTS
) -> BatchRecipe:
    """The recipe whose forward passes are predicted to end first; milliseconds, and the same on every rank.

    One pipeline without checkpointing; of elastic helix, as many rounds as the longest sequence leaves room
    for. Of elastic 1F1B, chunks are no larger than training may have them. Of activations only the keys
    and values of slices outlive their chunk, so what fits in training fits here.

    Args:
        lengths: tokens of every sequence.
        job: what it is planned for.
        slice_counts: numbers K of slices of the longest sequence to try.

    Raises:
        ValueError: lengths that are none, or chunks that hold more tokens than memory allows.
    """
    lengths = check_lengths(lengths)
    if job.schedule == round_schedule.SCHEDULE:
        # Of activations only keys and values outlive their operation.
        return make_rounds(
            lengths,
            job.costs,
            job.num_stages,
            most_rounds(lengths),
            2,
            job.recompute or "none",
            job.attention_range or DEFAULT_ATTENTION_RANGE,
        )
    chunkings, reasons = chunk_batch(
        lengths, job, lambda longest, count: equal_time_mesh(longest, count, job.costs), slice_counts
    )
    if not chunkings:
        raise ValueError(f"no plan fits the evaluation; {reasons[-1]}")
    recipes = [_recipe(chunks, job) for chunks in by_size(chunkings)[0].values()]
    return min(recipes, key=lambda recipe: forward_ms(recipe, job))


def forward_ms(recipe: Recipe, job: ElasticJob) -> float:
    """Predicted time of the forward passes alone."""
    plan = elastic_plan(recipe, job.num_layers).forward_only()
    costs = costs_of_recipe(recipe, job.num_layers, job.costs)
    return simulate(plan, costs).timeline.makespan_ms


def _recipe(chunks: Sequence[Chunk], job: ElasticJob) -> Recipe:
    ordered = order_chunks(chunks, job.costs)
    return nothing_checkpointed(ordered, (len(ordered),), job)
