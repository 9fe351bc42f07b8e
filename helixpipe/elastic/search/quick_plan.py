"""A plan in milliseconds, with the settings of another: for when the search cannot be waited for."""

from __future__ import annotations

from collections.abc import Sequence

from helixpipe.elastic import round_schedule
from helixpipe.elastic.chunk_schedule import order_chunks
from helixpipe.elastic.chunks import Chunk
from helixpipe.elastic.elastic_plan import ElasticPlan
from helixpipe.elastic.job import ElasticJob, check_lengths
from helixpipe.elastic.recipe import BatchRecipe, Recipe
from helixpipe.elastic.search.memory_rows import PipelineMemory
from helixpipe.elastic.search.message_room import fit_messages
from helixpipe.elastic.search.planner import SLICE_COUNTS, checkpoint_pipelines, group_for
from helixpipe.elastic.search.recomputation import Checkpointing, uniform_checkpointing
from helixpipe.elastic.search.round_planner import plan_rounds
from helixpipe.elastic.search.sequence_processor import equal_time_mesh, make_chunks


def num_slices_of(recipe: BatchRecipe) -> int:
    """K: slices of the most sliced sequence, 1 if none is."""
    return max((len(group) for group in recipe.slices), default=1)


def plan_quickly(lengths: Sequence[int], job: ElasticJob, num_slices: int = 1) -> ElasticPlan:
    """A plan that fits, without a search for the best: nothing is solved, and one K is tried if it fits.

    Every chunk and stage of a pipeline checkpoints the same number of layers, the least that fits. Elastic
    helix gets as many rounds as the longest sequence leaves room for.

    Args:
        lengths: tokens of every sequence.
        job: what it is planned for.
        num_slices: K to try first, that of another batch; then all of ``SLICE_COUNTS`` from small to large.

    Raises:
        ValueError: nothing fits.
    """
    lengths = check_lengths(lengths)
    if job.schedule == round_schedule.SCHEDULE:
        return plan_rounds(lengths, job, round_counts=(), folds=(2,))
    longest = max(lengths)
    reasons: list[str] = []
    for count in dict.fromkeys(min(count, longest) for count in (num_slices, *SLICE_COUNTS)):
        try:
            chunks = make_chunks(
                lengths, equal_time_mesh(longest, count, job.costs), job.costs, job.chunk_capacity()
            )
            return _plan(order_chunks(chunks, job.costs), job)
        except ValueError as error:
            reasons.append(f"with {count} slices: {error}")
    raise ValueError(f"no plan fits; {reasons[-1]}")


def _plan(chunks: tuple[Chunk, ...], job: ElasticJob) -> ElasticPlan:
    def decide(job: ElasticJob) -> Recipe:
        return checkpoint_pipelines(chunks, group_for(chunks, job)[0], job, _uniform)[0]

    return fit_messages(decide, job).validated()


def _uniform(memory: PipelineMemory, part: Sequence[Chunk]) -> Checkpointing:
    return uniform_checkpointing(memory)
