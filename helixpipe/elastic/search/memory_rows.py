"""What a stage holds at every moment of one 1F1B pipeline over chunks, as sums over its chunks.

A moment is described by how many forwards have begun and how many backwards have ended. The simulator's
``held_bytes`` walks the same moments, so a choice that satisfies all rows never exceeds the limit there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from helixpipe.elastic.chunk_schedule import backward_order, in_flight, sequence_groups
from helixpipe.elastic.chunks import Chunk
from helixpipe.elastic.costs.chunk_costs import ChunkCosts

Array = NDArray[np.int64]


@dataclass(frozen=True)
class StageRows:
    """Moments of a stage: forwards begun and backwards ended, and what is there beside what forwards keep.

    Attributes:
        begun: at each moment, chunks from the first whose forward has begun.
        ended: at each moment, chunks in backward order whose backward has ended.
        plain: bytes of the operation that runs, and of gradients for earlier slices, with nothing recomputed.
        recomputing: the same with a recomputed layer.
    """

    begun: Array
    ended: Array
    plain: Array
    recomputing: Array


@dataclass(frozen=True)
class PipelineMemory:
    """One pipeline's chunks, with what they keep on each stage.

    Attributes:
        groups: numbers of chunks of each sequence, in order.
        kept: ``kept[stage]``, bytes of every chunk with nothing checkpointed.
        saved: bytes that one checkpointed layer of a chunk saves, on any stage.
        gradients: ``gradients[stage]``, bytes of the gradients that later slices add to, of every chunk.
        plain: ``plain[stage]``, bytes of every chunk's operations while they run, with nothing recomputed.
        recomputing: the same with a recomputed layer.
        messages: bytes of each stage that buffers of messages take beside all this.
        available: bytes of each stage for all this: the limit less the stage's states and messages.
        layers: of each stage.
    """

    groups: tuple[int, ...]
    kept: Array
    saved: Array
    gradients: Array
    plain: Array
    recomputing: Array
    messages: Array
    available: Array
    layers: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        """Pipeline-parallel size."""
        return len(self.available)

    @property
    def num_chunks(self) -> int:
        """Chunks of the pipeline."""
        return len(self.saved)

    @property
    def max_layers(self) -> int:
        """Layers of the stage that has most."""
        return max(self.layers)

    def checkpointed(self, stage: int, counts: Array) -> Array:
        """Layers that a stage checkpoints where the one with most layers checkpoints ``counts``.

        The same share of its own, rounded up: it then saves no less, and takes no longer.
        """
        return -(-counts * self.layers[stage] // self.max_layers)

    @cached_property
    def backwards(self) -> Array:
        """Chunks in the order of their backwards."""
        return np.array(backward_order(self.groups), dtype=np.int64)

    @cached_property
    def positions(self) -> Array:
        """``f2b``: the place of each chunk among the backwards."""
        positions = np.empty(self.num_chunks, dtype=np.int64)
        positions[self.backwards] = np.arange(self.num_chunks)
        return positions

    def diagonals(self, stage: int) -> Array:
        """The diagonal of the backward wavefront that each chunk is on, on a stage from 0."""
        return self.positions + self.num_stages - 1 - stage

    def rows(self, stage: int) -> StageRows:
        """The moments at which a stage may hold most, all operations covered."""
        n = self.num_chunks
        window = min(in_flight(stage, self.num_stages, self.groups), n)
        # Warm-up: one forward after the other, and none backward.
        begun = np.concatenate([np.arange(1, window), np.minimum(np.arange(n) + window, n)])
        ended = np.concatenate([np.zeros(window - 1, dtype=np.int64), np.arange(n)])
        gradients = self._gradients(self.gradients[stage])
        plain, recomputing = (
            self._beside(workspace[stage], begun, gradients) for workspace in (self.plain, self.recomputing)
        )
        return StageRows(begun, ended, plain, recomputing)

    def _beside(self, workspace: Array, begun: Array, gradients: tuple[Array, Array]) -> Array:
        """``workspace`` of the operation that runs at each moment, and the gradients that exist by then.

        With so many begun and ended, the forward that came last has run, and the next backward runs.
        """
        first = len(begun) - self.num_chunks
        is_forward = np.diff(begun, prepend=0) > 0
        beside: Array = np.where(is_forward, workspace[begun - 1], 0)
        before, during = gradients
        beside[first:] += np.where(is_forward[first:], before, 0)
        beside[first:] = np.maximum(beside[first:], workspace[self.backwards] + during)
        return beside

    def _gradients(self, of_chunks: Array) -> tuple[Array, Array]:
        """Bytes of gradients for earlier slices, before and during each backward, in backward order."""
        sums = np.concatenate([[0], np.cumsum(of_chunks)])
        starts = np.repeat(np.cumsum([0, *self.groups[:-1]]), self.groups)
        during = (sums[1:] - sums[starts])[self.backwards]
        # Before the backward of a sequence's last slice there are none.
        is_last = np.diff(starts, append=-1)[self.backwards] != 0
        return np.where(is_last, 0, during), during

    def held(self, rows: StageRows, per_chunk: Array) -> Array:
        """At each moment, the sum of ``per_chunk`` over the chunks in flight."""
        forward: Array = np.concatenate([[0], np.cumsum(per_chunk)])
        backward: Array = np.concatenate([[0], np.cumsum(per_chunk[self.backwards])])
        held: Array = forward[rows.begun] - backward[rows.ended]
        return held

    def fits_unchecked(self) -> bool:
        """True if nothing need be checkpointed."""
        return all(
            bool((self.held(rows, self.kept[stage]) + rows.plain <= self.available[stage]).all())
            for stage, rows in enumerate(map(self.rows, range(self.num_stages)))
        )

    def shortage(self) -> tuple[int, int] | None:
        """The stage that lacks most, and how many bytes, with everything checkpointed; None if it fits."""
        worst: tuple[int, int] | None = None
        for stage in range(self.num_stages):
            rows = self.rows(stage)
            least = self.kept[stage] - self.layers[stage] * self.saved
            missing = int((self.held(rows, least) + rows.recomputing).max() - self.available[stage])
            if missing > 0 and (worst is None or missing > worst[1]):
                worst = stage, missing
        return worst


def pipeline_memory(
    chunks: Sequence[Chunk],
    costs: ChunkCosts,
    *,
    stage_layers: Sequence[int],
    limit_bytes: int,
    reserved_bytes: Sequence[int] = (),
) -> PipelineMemory:
    """The memory of one pipeline over ``chunks``, which are in order.

    Args:
        chunks: of the pipeline.
        costs: what they keep.
        stage_layers: layers of each stage.
        limit_bytes: of one GPU, states and messages included.
        reserved_bytes: of each stage, for buffers of messages; empty for nothing.
    """
    num_stages = len(stage_layers)
    kept = [
        [costs.activation_bytes(c, layers, is_last=stage == num_stages - 1) for c in chunks]
        for stage, layers in enumerate(stage_layers)
    ]
    gradients = [[costs.gradient_bytes(c, layers) for c in chunks] for layers in stage_layers]
    plain, recomputing = (
        np.array(
            [
                [
                    costs.workspace_bytes(c, is_last=stage == num_stages - 1, recomputes=recomputes)
                    for c in chunks
                ]
                for stage in range(num_stages)
            ],
            dtype=np.int64,
        )
        for recomputes in (False, True)
    )
    states = [costs.state_bytes(stage, num_stages, layers) for stage, layers in enumerate(stage_layers)]
    messages = np.array(reserved_bytes or [0] * num_stages, dtype=np.int64)
    return PipelineMemory(
        groups=tuple(sequence_groups(chunks)),
        kept=np.array(kept, dtype=np.int64),
        saved=np.array([costs.saved_bytes(chunk) for chunk in chunks], dtype=np.int64),
        gradients=np.array(gradients, dtype=np.int64),
        plain=plain,
        recomputing=recomputing,
        messages=messages,
        available=limit_bytes - np.array(states, dtype=np.int64) - messages,
        layers=tuple(stage_layers),
    )
