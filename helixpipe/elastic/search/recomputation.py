"""Stage-aware chunk-level checkpointing (InfiniPipe, arXiv 2509.21275, section 4.5).

What one chunk recomputes on one stage delays everyone once. Chunks whose backwards run at the same time on
different stages, a diagonal of the backward wavefront, therefore share their number of checkpointed layers:
``ckpt(q, k) = C[f2b(k) + d_p - q]``, n + d_p - 1 integers instead of n d_p. Of stages with different numbers
of layers they share the part of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from helixpipe.elastic.search.memory_rows import Array, PipelineMemory, StageRows

# SciPy is imported where it solves: half a second, which every rank of every schedule would pay at its start.
if TYPE_CHECKING:
    from scipy.sparse import csr_array

# Rows are divided by their largest coefficient; the solver may miss them by its tolerance of 1e-6.
_MARGIN = 2e-6

Vector = NDArray[np.float64]
Counts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Checkpointing:
    """Checkpointed layers of a pipeline.

    Attributes:
        counts: ``counts[stage][chunk]``.
        solver_seconds: 0 where nothing had to be solved.
    """

    counts: Counts
    solver_seconds: float = 0.0


class OutOfMemory(ValueError):
    """A pipeline that exceeds the limit with all layers checkpointed.

    Attributes:
        stage: the one that lacks most.
        missing_bytes: on each of its GPUs.
    """

    def __init__(self, stage: int, missing_bytes: int, memory: PipelineMemory) -> None:
        self.stage = stage
        self.missing_bytes = missing_bytes
        gib = missing_bytes / 2**30
        messages = int(memory.messages[stage])
        if memory.available[stage] + messages <= 0:
            cause = "its weights, gradients and optimizer states alone exceed the limit"
            change = "use more stages, a larger tensor-parallel size or a higher limit"
        else:
            rows = memory.rows(stage)
            window = int((rows.begun - rows.ended).max())
            cause = f"with all layers checkpointed in each of the {window} chunks in flight"
            cause += f" and {messages / 2**30:.2f} GiB of messages" if messages else ""
            change = (
                "use a lower token capacity, more slices, a larger tensor-parallel size or a higher limit"
            )
        super().__init__(
            f"stage {stage} is {missing_bytes} bytes ({gib:.2f} GiB) short of memory: {cause}; {change}"
        )


def solve_checkpointing(
    memory: PipelineMemory,
    recompute_ms: Sequence[float],
    *,
    gap: float = 0.02,
    time_limit_s: float = 10.0,
) -> Checkpointing:
    """The layers to checkpoint so that a pipeline fits, with the least delay up to ``gap``.

    Minimises the sum over diagonals of their count, each weighted by the longest time that one recomputed
    layer of its chunks takes, subject to every moment of every stage. (The paper's objective is the plain
    sum of counts, which is the same where chunks take equally long.)

    Args:
        memory: of the pipeline.
        recompute_ms: of every chunk, one layer.
        gap: share of the objective by which the answer may miss the least.
        time_limit_s: after which the best answer found is taken.

    Raises:
        OutOfMemory: checkpointing everything is not enough.
    """
    n, p = memory.num_chunks, memory.num_stages
    if memory.fits_unchecked():
        return Checkpointing(((0,) * n,) * p)
    shortage = memory.shortage()
    if shortage is not None:
        raise OutOfMemory(*shortage, memory)
    from scipy.sparse import vstack

    started = time.perf_counter()
    blocks, bounds = zip(*(_constraints(memory, stage) for stage in range(p)), strict=True)
    program = _Program(
        _weights(memory, recompute_ms),
        vstack(blocks, format="csr"),
        np.concatenate(bounds),
        memory.max_layers,
    )
    solution = program.solve(gap, time_limit_s)
    shared = solution.astype(np.int64)
    counts = tuple(
        tuple(memory.checkpointed(stage, shared[memory.diagonals(stage)]).tolist()) for stage in range(p)
    )
    return Checkpointing(counts, time.perf_counter() - started)


@dataclass(frozen=True)
class _Program:
    """Minimise ``weights C`` subject to ``matrix C <= bounds``, C whole and 0 to ``most``; matrix <= 0."""

    weights: Vector
    matrix: csr_array
    bounds: Vector
    most: int

    def solve(self, gap: float, time_limit_s: float) -> Vector:
        """The best of the rounded relaxation and, unless that is good enough, what HiGHS finds in time."""
        relaxed = self._run(0, gap, time_limit_s)
        if relaxed is None:
            # Only the margin is in the way: everything fits checkpointed.
            return np.full(len(self.weights), self.most)
        rounded = self._rounded(relaxed)
        if self.weights @ rounded <= (1 + gap) * (self.weights @ relaxed):
            return rounded
        found = self._run(1, gap, time_limit_s)
        if found is None or self.weights @ rounded <= self.weights @ np.rint(found):
            return rounded
        return np.rint(found)

    def _run(self, integrality: int, gap: float, time_limit_s: float) -> Vector | None:
        from scipy.optimize import Bounds, LinearConstraint, milp

        result = milp(
            self.weights,
            integrality=np.full(len(self.weights), integrality),
            bounds=Bounds(0, self.most),
            constraints=LinearConstraint(self.matrix, ub=self.bounds),
            options={"mip_rel_gap": gap, "time_limit": time_limit_s},
        )
        found: Vector | None = result.x
        return found

    def _rounded(self, relaxed: Vector) -> Vector:
        """The relaxed solution rounded up, which always fits, and lowered again where there is slack.

        Those that were rounded up most are tried first, the dearer one of two.
        """
        solution = np.ceil(relaxed)
        columns = self.matrix.tocsc()
        slack = self.bounds - self.matrix @ solution
        for v in np.lexsort((-self.weights, relaxed - solution)):
            part = slice(columns.indptr[v], columns.indptr[v + 1])
            rows, saved = columns.indices[part], -columns.data[part]
            while solution[v] > 0 and (slack[rows] >= saved).all():
                solution[v] -= 1
                slack[rows] -= saved
        return solution


def _weights(memory: PipelineMemory, recompute_ms: Sequence[float]) -> Vector:
    weights = np.zeros(memory.num_chunks + memory.num_stages - 1)
    for stage in range(memory.num_stages):
        np.maximum.at(weights, memory.diagonals(stage), np.asarray(recompute_ms))
    # HiGHS is at its best with numbers near one; costs without forward time leave zeros.
    scaled: Vector = weights / (weights.max() or 1.0)
    return scaled


def _constraints(memory: PipelineMemory, stage: int) -> tuple[csr_array, Vector]:
    """``-sum(saved C) <= available - sum(kept) - beside`` at every moment that needs it.

    A recomputed layer's activation counts whether or not the operation recomputes: exact would need an
    indicator for each diagonal.
    """
    from scipy.sparse import csr_array

    rows = memory.rows(stage)
    room = memory.available[stage] - memory.held(rows, memory.kept[stage]) - rows.recomputing
    needed = np.flatnonzero(room < 0)
    columns, values, scales, ends = [], [], [], [0]
    where = memory.diagonals(stage)
    saved = memory.saved * (memory.layers[stage] / memory.max_layers)
    for row in needed:
        members = _members(memory, rows, int(row))
        columns.append(where[members])
        scales.append(saved[members].max())
        values.append(-saved[members] / scales[-1])
        ends.append(ends[-1] + len(members))
    shape = (len(needed), memory.num_chunks + memory.num_stages - 1)
    if not len(needed):
        return csr_array(shape), np.zeros(0)
    matrix = csr_array((np.concatenate(values), np.concatenate(columns), np.array(ends)), shape=shape)
    # Bytes are whole numbers, so half of one more changes nothing but that what fits exactly is found.
    return matrix, (room[needed] + 0.5) / np.array(scales) - _MARGIN


def _members(memory: PipelineMemory, rows: StageRows, row: int) -> Array:
    """The chunks in flight at a moment: those begun that are not among the first ended."""
    pending = memory.backwards[rows.ended[row] :]
    members: Array = pending[pending < rows.begun[row]]
    return members


def uniform_checkpointing(memory: PipelineMemory) -> Checkpointing:
    """The least number of layers that fits if all chunks and stages have the same (static checkpointing).

    A stage that has fewer checkpoints them all.

    Raises:
        OutOfMemory: all layers are not enough.
    """
    for count in range(memory.max_layers + 1):
        fits = True
        for stage in range(memory.num_stages):
            rows = memory.rows(stage)
            held = memory.held(rows, memory.kept[stage] - min(count, memory.layers[stage]) * memory.saved)
            held += rows.recomputing if count else rows.plain
            fits = fits and bool((held <= memory.available[stage]).all())
        if fits:
            return Checkpointing(tuple((min(count, own),) * memory.num_chunks for own in memory.layers))
    shortage = memory.shortage()
    assert shortage is not None
    raise OutOfMemory(*shortage, memory)
