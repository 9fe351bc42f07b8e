"""From a batch's sequence lengths to an elastic plan (InfiniPipe, arXiv 2509.21275, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from helixpipe.elastic.chunk_schedule import costs_of_recipe, elastic_plan, order_chunks
from helixpipe.elastic.chunks import Chunk
from helixpipe.elastic.elastic_plan import ElasticPlan
from helixpipe.elastic.job import ElasticJob, check_lengths
from helixpipe.elastic.recipe import Recipe
from helixpipe.elastic.search.grouping import group_sequences
from helixpipe.elastic.search.memory_rows import PipelineMemory, pipeline_memory
from helixpipe.elastic.search.message_room import Fitted, fit_messages
from helixpipe.elastic.search.recomputation import Checkpointing, OutOfMemory, solve_checkpointing
from helixpipe.elastic.search.sequence_processor import equal_time_mesh, make_chunks, pack_to_length
from helixpipe.plan.simulation.simulate import simulate

# Numbers of slices of the longest sequence that are tried: closer together where one more changes much.
SLICE_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
# How many candidates are solved exactly, and into how many parts the solver's time is cut: those that the
# rough estimate of the delay by recomputation leaves in the race.
_MOST_SOLVED = 6
_PARTS_OF_TIME = 3
# By how much an estimate may be too high.
_DOUBT = 1.03
# More chunks than this are tried only if no fewer fit: planning takes long, and the ramp is short anyway.
MOST_CHUNKS = 1024

Mesh = Callable[[int, int], Sequence[int]]
Chunkings = dict[str, tuple[Chunk, ...]]


@dataclass(frozen=True)
class Candidate:
    """A way to make chunks, and what it was estimated to take.

    Attributes:
        label: like ``8 slices``.
        chunks: in order.
        pipelines: numbers of chunks.
        estimate_ms: without checkpointing simulated, with it estimated.
    """

    label: str
    chunks: tuple[Chunk, ...]
    pipelines: tuple[int, ...]
    estimate_ms: float

    @property
    def is_sliced(self) -> bool:
        """True unless all sequences are whole."""
        return any(chunk.sliced_sequence is not None for chunk in self.chunks)


def plan_batch(
    lengths: Sequence[int], job: ElasticJob, *, slice_counts: Sequence[int] = SLICE_COUNTS
) -> ElasticPlan:
    """The fastest elastic plan found for a batch; the same each time unless the solver runs out of time.

    Args:
        lengths: tokens of every sequence.
        job: what it is planned for.
        slice_counts: numbers K of slices of the longest sequence to try; 1 is pure packing.

    Raises:
        ValueError: lengths that are none, or no candidate fits; the message says what lacks and what to
            change.
    """
    return best_plan(*_chunkings(lengths, job, slice_counts), job)


def estimate_batch(
    lengths: Sequence[int], job: ElasticJob, *, slice_counts: Sequence[int] = SLICE_COUNTS
) -> float:
    """Milliseconds that a batch is estimated to take, as the search ranks what it then solves.

    Nothing is solved against a clock, so that every rank finds the same.

    Args:
        lengths: tokens of every sequence.
        job: what it is planned for.
        slice_counts: see :func:`plan_batch`.

    Raises:
        ValueError: see :func:`plan_batch`; buffers of messages are not counted.
    """
    chunkings, reasons = _chunkings(lengths, job, slice_counts)
    failures: list[tuple[int, str]] = []
    for part in by_size(chunkings):
        found = _candidates(part, failures, job)
        if found:
            return min(candidate.estimate_ms for candidate in found)
    raise ValueError(_why_none(failures, reasons))


def _chunkings(
    lengths: Sequence[int], job: ElasticJob, slice_counts: Sequence[int]
) -> tuple[Chunkings, list[str]]:
    """Chunks to choose from, by label, and why others are impossible."""
    lengths = check_lengths(lengths)
    if not slice_counts or min(slice_counts) < 1:
        raise ValueError("at least one number of slices must be tried, and none below 1")

    def mesh(longest: int, num_slices: int) -> Sequence[int]:
        return equal_time_mesh(longest, num_slices, job.costs)

    chunkings, reasons = chunk_batch(lengths, job, mesh, slice_counts)
    if 1 in slice_counts and max(lengths) <= job.chunk_capacity():
        chunkings["packed to the longest"] = pack_to_length(lengths, max(lengths))
    return chunkings, reasons


def chunk_batch(
    lengths: Sequence[int], job: ElasticJob, mesh: Mesh, slice_counts: Sequence[int]
) -> tuple[Chunkings, list[str]]:
    """Chunks for each number of slices, by label, and why others are impossible."""
    capacity, longest = job.chunk_capacity(), max(lengths)
    chunkings: Chunkings = {}
    reasons = []
    for num_slices in dict.fromkeys(min(count, longest) for count in slice_counts):
        label = f"{num_slices} slices" if num_slices > 1 else "no slices"
        try:
            chunkings[label] = make_chunks(lengths, mesh(longest, num_slices), job.costs, capacity)
        except ValueError as error:
            reasons.append(f"{label}: {error}")
    return chunkings, reasons


def by_size(chunkings: Chunkings) -> tuple[Chunkings, Chunkings]:
    """The chunkings of at most ``MOST_CHUNKS`` chunks, or that of the fewest if all have more; the others."""
    most = max(MOST_CHUNKS, min((len(chunks) for chunks in chunkings.values()), default=0))
    few = {label: chunks for label, chunks in chunkings.items() if len(chunks) <= most}
    return few, {label: chunks for label, chunks in chunkings.items() if label not in few}


def best_plan(chunkings: Chunkings, reasons: Sequence[str], job: ElasticJob) -> ElasticPlan:
    """Group, checkpoint and simulate chunkings, and return the fastest plan.

    Args:
        chunkings: to choose from, by label.
        reasons: why others are impossible.
        job: what they are for.

    Raises:
        ValueError: none fits; the message tells what the one that lacks least lacks.
    """
    failures: list[tuple[int, str]] = []
    for part in by_size(chunkings):
        found = _fastest(_candidates(part, failures, job), failures, job)
        if found is not None:
            return found
    raise ValueError(_why_none(failures, reasons))


def _candidates(chunkings: Chunkings, failures: list[tuple[int, str]], job: ElasticJob) -> list[Candidate]:
    """Those that fit without messages; ``failures`` gets what the others lack."""
    found = []
    for label, chunks in chunkings.items():
        try:
            found.append(_estimate(label, order_chunks(chunks, job.costs), job))
        except OutOfMemory as error:
            failures.append((error.missing_bytes, f"{label}: {error}"))
    return found


def _why_none(failures: Sequence[tuple[int, str]], reasons: Sequence[str]) -> str:
    return f"no plan fits; with {min(failures)[1] if failures else reasons[-1]}"


def _fastest(
    candidates: Sequence[Candidate], failures: list[tuple[int, str]], job: ElasticJob
) -> ElasticPlan | None:
    """Solve the candidates that may be the fastest, and those without slices, which no plan may lose to.

    Args:
        candidates: that fit without messages.
        failures: gets what those lack that do not fit with them.
        job: what they are for.
    """
    best: Fitted | None = None
    seconds, solved = 0.0, 0
    for candidate in sorted(candidates, key=lambda candidate: candidate.estimate_ms):
        may_win = best is None or candidate.estimate_ms < _DOUBT * best.prediction.time_ms
        has_time = best is None or (solved < _MOST_SOLVED and seconds < job.time_limit_s)
        if candidate.is_sliced and not (may_win and has_time):
            continue
        solver = _Solver(candidate)
        try:
            found = fit_messages(solver, job)
        except OutOfMemory as error:
            failures.append((error.missing_bytes, f"{candidate.label}: {error}"))
        else:
            if best is None or found.prediction.time_ms < best.prediction.time_ms:
                best = found
        seconds += solver.seconds
        solved += 1
    return None if best is None else best.validated(seconds)


class _Solver:
    """Decides what a candidate checkpoints, for a job with more or less memory.

    Attributes:
        seconds: that it has solved so far.
    """

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        self.seconds = 0.0

    def __call__(self, job: ElasticJob) -> Recipe:
        """The recipe."""
        chunks, pipelines = self._candidate.chunks, self._candidate.pipelines
        if job.reserved_bytes:
            pipelines, _ = group_for(chunks, job)
        recipe, seconds = solve(chunks, pipelines, job)
        self.seconds += seconds
        return recipe


def group_for(chunks: Sequence[Chunk], job: ElasticJob) -> tuple[tuple[int, ...], float]:
    """Pipelines of ordered chunks, and the delay by recomputation; see :func:`.grouping.group_sequences`."""
    return group_sequences(
        chunks,
        job.costs,
        stage_layers=job.layers_by_stage,
        limit_bytes=job.memory_limit_bytes,
        reserved_bytes=job.reserved_bytes,
    )


def nothing_checkpointed(chunks: tuple[Chunk, ...], pipelines: Sequence[int], job: ElasticJob) -> Recipe:
    """The recipe of ordered chunks of which nothing is computed twice."""
    return Recipe(chunks, tuple(pipelines), ((0,) * len(chunks),) * job.num_stages, job.stage_layers)


def _estimate(label: str, chunks: tuple[Chunk, ...], job: ElasticJob) -> Candidate:
    pipelines, delay_ms = group_for(chunks, job)
    unchecked = nothing_checkpointed(chunks, pipelines, job)
    costs = costs_of_recipe(unchecked, job.num_layers, job.costs)
    unchecked_ms = simulate(elastic_plan(unchecked, job.num_layers), costs).timeline.makespan_ms
    return Candidate(label, chunks, pipelines, unchecked_ms + delay_ms)


def solve(chunks: tuple[Chunk, ...], pipelines: Sequence[int], job: ElasticJob) -> tuple[Recipe, float]:
    """The recipe of ordered chunks in given pipelines, and the seconds that its checkpointing took.

    Raises:
        OutOfMemory: checkpointing everything is not enough.
    """

    def solved(memory: PipelineMemory, part: Sequence[Chunk]) -> Checkpointing:
        return solve_checkpointing(
            memory,
            [job.costs.recompute_ms(chunk) for chunk in part],
            gap=job.gap,
            time_limit_s=job.time_limit_s / _PARTS_OF_TIME * len(part) / len(chunks),
        )

    return checkpoint_pipelines(chunks, pipelines, job, solved)


def checkpoint_pipelines(
    chunks: tuple[Chunk, ...],
    pipelines: Sequence[int],
    job: ElasticJob,
    decide: Callable[[PipelineMemory, Sequence[Chunk]], Checkpointing],
) -> tuple[Recipe, float]:
    """The recipe of ordered chunks whose layers ``decide`` checkpoints, and the seconds that it solved."""
    recipe = nothing_checkpointed(chunks, pipelines, job)
    rows: list[list[int]] = [[] for _ in range(job.num_stages)]
    seconds = 0.0
    for members in recipe.ranges:
        part = chunks[members.start : members.stop]
        memory = pipeline_memory(
            part,
            job.costs,
            stage_layers=job.layers_by_stage,
            limit_bytes=job.memory_limit_bytes,
            reserved_bytes=job.reserved_bytes,
        )
        found = decide(memory, part)
        seconds += found.solver_seconds
        for row, counts in zip(rows, found.counts, strict=True):
            row += counts
    return replace(recipe, checkpointed=tuple(tuple(row) for row in rows)), seconds
