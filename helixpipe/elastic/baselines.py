"""What others would do with the same batch: the schedules that an elastic plan is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from helixpipe.elastic.chunk_schedule import order_chunks
from helixpipe.elastic.chunks import Chunk, Piece
from helixpipe.elastic.elastic_plan import ElasticPlan, Prediction
from helixpipe.elastic.job import ElasticJob, check_lengths
from helixpipe.elastic.recipe import Recipe
from helixpipe.elastic.search.message_room import Fitted, fit_messages
from helixpipe.elastic.search.planner import (
    SLICE_COUNTS,
    best_plan,
    by_size,
    checkpoint_pipelines,
    chunk_batch,
)
from helixpipe.elastic.search.recomputation import OutOfMemory, uniform_checkpointing
from helixpipe.elastic.search.sequence_processor import even_mesh, pack_to_length


@dataclass(frozen=True)
class Baseline:
    """Another way to run the batch.

    Attributes:
        label: for people.
        prediction: None where it does not fit.
        num_chunks: micro batches; 0 where it does not fit.
        reason: why it does not fit; empty where it does.
    """

    label: str
    prediction: Prediction | None
    num_chunks: int = 0
    reason: str = ""


def predict_baselines(lengths: Sequence[int], job: ElasticJob) -> tuple[Baseline, ...]:
    """Packing to the maximum length, fixed-size chunks and even slices, each at its best setting."""
    lengths = check_lengths(lengths)
    return (
        packed_to_longest(lengths, job),
        fixed_size_chunks(lengths, job),
        even_slices(lengths, job),
    )


def packed_to_longest(lengths: Sequence[int], job: ElasticJob) -> Baseline:
    """Whole sequences packed to the longest one's length, 1F1B, the same layers checkpointed everywhere."""
    label = "packed to the longest, 1F1B"
    try:
        found = packed_plan(lengths, job)
    except OutOfMemory as error:
        return Baseline(label, None, reason=str(error))
    return Baseline(label, found.prediction, len(found.recipe.chunks))


def packed_plan(lengths: Sequence[int], job: ElasticJob) -> ElasticPlan:
    """The plan behind :func:`packed_to_longest`, to be executed.

    Raises:
        OutOfMemory: it does not fit.
    """
    chunks = pack_to_length(lengths, max(lengths))
    return _static(order_chunks(chunks, job.costs), job).validated()


def fixed_size_chunks(
    lengths: Sequence[int], job: ElasticJob, slice_counts: Sequence[int] = SLICE_COUNTS
) -> Baseline:
    """Seq1F1B as InfiniPipe compares with it: chunks of one size in tokens, static checkpointing.

    The size is the fastest of the longest sequence's length over each of ``slice_counts``.
    """
    sizes = dict.fromkeys(-(-max(lengths) // count) for count in slice_counts)
    chunkings = {f"fixed-size chunks of {size} tokens": cut_to_size(lengths, size) for size in sizes}
    found: list[tuple[float, Baseline]] = []
    reason = ""
    for part in by_size(chunkings):
        if found:
            break
        for label, chunks in part.items():
            try:
                prediction = _static(order_chunks(chunks, job.costs), job).prediction
            except OutOfMemory as error:
                reason = f"{label}: {error}"
            else:
                found.append((prediction.time_ms, Baseline(label, prediction, len(chunks))))
    if not found:
        return Baseline("fixed-size chunks", None, reason=reason)
    return min(found, key=lambda entry: entry[0])[1]


def cut_to_size(lengths: Sequence[int], size: int) -> tuple[Chunk, ...]:
    """Sequences cut every ``size`` tokens; what is left over, and short ones, packed to ``size``.

    Two tails never share a chunk: each needs its own keys and values before it.
    """
    chunks: list[Chunk] = []
    buckets: list[list[Piece]] = []
    shorts: list[Piece] = []
    for sequence, length in enumerate(lengths):
        if length <= size:
            shorts.append(Piece(sequence, 0, length, length))
            continue
        pieces = [Piece(sequence, s, min(size, length - s), length) for s in range(0, length, size)]
        if pieces[-1].length < size:
            buckets.append([pieces.pop()])
        chunks += [Chunk((piece,)) for piece in pieces]
    room = [size - bucket[0].length for bucket in buckets]
    for piece in sorted(shorts, key=lambda piece: (-piece.length, piece.sequence)):
        bucket = next((i for i, free in enumerate(room) if free >= piece.length), len(room))
        if bucket == len(room):
            room.append(size)
            buckets.append([])
        room[bucket] -= piece.length
        buckets[bucket].append(piece)
    return (*chunks, *(Chunk(tuple(pieces)) for pieces in buckets))


def even_slices(
    lengths: Sequence[int], job: ElasticJob, slice_counts: Sequence[int] = SLICE_COUNTS
) -> Baseline:
    """The elastic plan with slices of equal length instead of equal time, in all else the same."""
    label = "even slices"
    chunkings, reasons = chunk_batch(
        lengths, job, even_mesh, [count for count in slice_counts if count > 1] or [1]
    )
    try:
        found = best_plan(chunkings, reasons, job)
    except ValueError as error:
        return Baseline(label, None, reason=str(error))
    return Baseline(label, found.prediction, len(found.recipe.chunks))


def _static(chunks: tuple[Chunk, ...], job: ElasticJob) -> Fitted:
    """One pipeline over ordered chunks with the same layers checkpointed in all of them."""

    def decide(job: ElasticJob) -> Recipe:
        return checkpoint_pipelines(
            chunks, (len(chunks),), job, lambda memory, _: uniform_checkpointing(memory)
        )[0]

    return fit_messages(decide, job)
