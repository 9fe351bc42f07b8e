"""Which sequences share a pipeline (InfiniPipe, arXiv 2509.21275, section 4.4).

A pipeline keeps ``d_p - q + N_split`` chunks in flight, where ``N_split`` is that of its most sliced
sequence. Short sequences that share a pipeline with a long one are thus held longer than they need be, and
must recompute more; a pipeline of their own costs them another ramp.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import inf

import numpy as np

from helixpipe.elastic.chunk_schedule import sequence_groups
from helixpipe.elastic.chunks import Chunk
from helixpipe.elastic.costs.chunk_costs import ChunkCosts
from helixpipe.elastic.search.memory_rows import PipelineMemory, pipeline_memory
from helixpipe.elastic.search.recomputation import OutOfMemory


def group_sequences(
    chunks: Sequence[Chunk],
    costs: ChunkCosts,
    *,
    stage_layers: Sequence[int],
    limit_bytes: int,
    reserved_bytes: Sequence[int] = (),
) -> tuple[tuple[int, ...], float]:
    """Numbers of chunks of pipelines that run back to back, and the delay by recomputation in all of them.

    ``dp[i + 1] = min over k of dp[k] + delta + T_ckpt(k..i)`` over sequences by falling number of slices. A
    cut between sequences of equally many slices would pay ``delta`` and shorten no window, so only
    cuts where the number changes are tried.

    Args:
        chunks: in order, sequences with more slices first.
        costs: what chunks take and keep.
        stage_layers: layers of each of the d_p stages.
        limit_bytes: of one GPU.
        reserved_bytes: of it, on each stage, for buffers of messages; empty for nothing.

    Raises:
        OutOfMemory: even sequences of equally many slices alone exceed it with everything checkpointed.
    """
    bounds = _cuts(sequence_groups(chunks))
    stage_ms = max(stage_layers) * sum(costs.layer_ms(chunk.area, chunk.tokens) for chunk in chunks)
    delta = (len(stage_layers) - 1) * stage_ms / len(chunks)
    best = [0.0] + [inf] * (len(bounds) - 1)
    previous = [0] * len(bounds)
    for last in range(1, len(bounds)):
        for first in range(last):
            members = chunks[bounds[first] : bounds[last]]
            memory = pipeline_memory(
                members,
                costs,
                stage_layers=stage_layers,
                limit_bytes=limit_bytes,
                reserved_bytes=reserved_bytes,
            )
            cost = best[first] + delta + recompute_delay_ms(memory, [costs.recompute_ms(c) for c in members])
            if cost < best[last]:
                best[last], previous[last] = cost, first
        if best[last] == inf:
            shortage = memory.shortage()
            assert shortage is not None, "the last pipeline tried has the fewest chunks"
            raise OutOfMemory(*shortage, memory)
    sizes: list[int] = []
    at = len(bounds) - 1
    while at:
        sizes.append(bounds[at] - bounds[previous[at]])
        at = previous[at]
    return tuple(reversed(sizes)), best[-1] - delta * len(sizes)


def _cuts(groups: Sequence[int]) -> list[int]:
    """Positions in chunks at which the number of slices changes, with both ends."""
    ends = list(accumulate(groups, initial=0))
    inner = [ends[i] for i in range(1, len(groups)) if groups[i] != groups[i - 1]]
    return [0, *inner, ends[-1]]


def recompute_delay_ms(memory: PipelineMemory, recompute_ms: Sequence[float]) -> float:
    """``T_ckpt`` of a pipeline, estimated: what each diagonal's tightest moment asks for, in fractions.

    Infinite if checkpointing everything is not enough.
    """
    if memory.fits_unchecked():
        return 0.0
    if memory.shortage() is not None:
        return inf
    layers = np.zeros(memory.num_chunks + memory.num_stages - 1)
    weights = np.zeros_like(layers)
    for stage in range(memory.num_stages):
        rows = memory.rows(stage)
        missing = memory.held(rows, memory.kept[stage]) + rows.recomputing - memory.available[stage]
        share = np.maximum(missing, 0) / np.maximum(memory.held(rows, memory.saved), 1)
        # The moment at which a chunk's backward runs stands for those that it is in flight.
        steady = share[-memory.num_chunks :] * (memory.max_layers / memory.layers[stage])
        where = memory.diagonals(stage)
        np.maximum.at(layers, where, steady[memory.positions])
        np.maximum.at(weights, where, np.asarray(recompute_ms))
    return float(np.minimum(layers, memory.max_layers) @ weights)
