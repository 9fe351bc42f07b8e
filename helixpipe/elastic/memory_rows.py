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

from helixpipe.elastic.chunk_costs import ChunkCosts
from helixpipe.elastic.chunk_schedule import backward_order, in_flight, sequence_groups
from helixpipe.elastic.chunks import Chunk

Array = NDArray[np.int64]


@dataclass(frozen=True)
class StageRows:
    """Moments of a stage: forwards begun and backwards ended, and what the operation needs while it runs.

    Attributes:
        begun: at each moment, chunks from the first whose forward has begun.
        ended: at each moment, chunks in backward order whose backward has ended.
        transient: bytes of a recomputed layer of the operations that run at the moment, if there is one.
    """

    begun: Array
    ended: Array
    transient: Array


@dataclass(frozen=True)
class PipelineMemory:
    """One pipeline's chunks, with what they keep on each stage.

    Attributes:
        groups: numbers of chunks of each sequence, in order.
        kept: ``kept[stage]``, bytes of every chunk with nothing checkpointed.
        saved: bytes that one checkpointed layer of a chunk saves, on any stage.
        transient: bytes of one layer's activation of every chunk.
        available: bytes of each stage for all this: the limit less the stage's states.
        max_layers: layers of a stage.
    """

    groups: tuple[int, ...]
    kept: Array
    saved: Array
    transient: Array
    available: Array
    max_layers: int

    @property
    def num_stages(self) -> int:
        """Pipeline-parallel size."""
        return len(self.available)

    @property
    def num_chunks(self) -> int:
        """Chunks of the pipeline."""
        return len(self.saved)

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
        # With so many begun and ended, the forward that came last ran, and the next backward runs.
        transient = self.transient[begun - 1].copy()
        steady = slice(window - 1, None)
        transient[steady] = np.maximum(transient[steady], self.transient[self.backwards])
        return StageRows(begun, ended, transient)

    def held(self, rows: StageRows, per_chunk: Array) -> Array:
        """At each moment, the sum of ``per_chunk`` over the chunks in flight."""
        forward: Array = np.concatenate([[0], np.cumsum(per_chunk)])
        backward: Array = np.concatenate([[0], np.cumsum(per_chunk[self.backwards])])
        held: Array = forward[rows.begun] - backward[rows.ended]
        return held

    def fits_unchecked(self) -> bool:
        """True if nothing need be checkpointed."""
        return all(
            bool((self.held(self.rows(stage), self.kept[stage]) <= self.available[stage]).all())
            for stage in range(self.num_stages)
        )

    def shortage(self) -> tuple[int, int] | None:
        """The stage that lacks most, and how many bytes, with everything checkpointed; None if it fits."""
        worst: tuple[int, int] | None = None
        for stage in range(self.num_stages):
            rows = self.rows(stage)
            least = self.kept[stage] - self.max_layers * self.saved
            missing = int((self.held(rows, least) + rows.transient).max() - self.available[stage])
            if missing > 0 and (worst is None or missing > worst[1]):
                worst = stage, missing
        return worst


def pipeline_memory(
    chunks: Sequence[Chunk], costs: ChunkCosts, *, num_stages: int, num_layers: int, limit_bytes: int
) -> PipelineMemory:
    """The memory of one pipeline over ``chunks``, which are in order.

    Args:
        chunks: of the pipeline.
        costs: what they keep.
        num_stages: pipeline-parallel size.
        num_layers: of the whole model.
        limit_bytes: of one GPU, states included.
    """
    layers = num_layers // num_stages
    kept = [
        [costs.activation_bytes(c, layers, is_last=stage == num_stages - 1) for c in chunks]
        for stage in range(num_stages)
    ]
    states = [costs.state_bytes(stage, num_stages, layers) for stage in range(num_stages)]
    return PipelineMemory(
        groups=tuple(sequence_groups(chunks)),
        kept=np.array(kept, dtype=np.int64),
        saved=np.array([costs.saved_bytes(chunk) for chunk in chunks], dtype=np.int64),
        transient=np.array([costs.transient_bytes(chunk) for chunk in chunks], dtype=np.int64),
        available=limit_bytes - np.array(states, dtype=np.int64),
        max_layers=layers,
    )
