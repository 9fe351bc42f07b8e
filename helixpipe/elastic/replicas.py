"""Sharing a batch out over data-parallel replicas.

Replicas meet only when they reduce their gradients, so they may differ in chunks; but all wait for the
slowest.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from helixpipe.elastic.costs.chunk_costs import ChunkCosts
from helixpipe.elastic.job import check_lengths


def share_out(lengths: Sequence[int], costs: ChunkCosts, num_replicas: int) -> tuple[tuple[int, ...], ...]:
    """Indices of the sequences of each replica, in order, so that replicas compute about equally long.

    Longest first, each to the replica with the least work so far: at most a third over the best possible
    (Graham 1969), and far less with many short sequences.

    Raises:
        ValueError: fewer sequences than replicas; every replica needs one, or its pipeline would idle and its
            ranks would wait for messages that never come.
    """
    lengths = check_lengths(lengths)
    if not 1 <= num_replicas <= len(lengths):
        raise ValueError(
            f"{len(lengths)} sequences cannot be shared out over {num_replicas} data-parallel replicas; each "
            "needs at least one: use a larger global batch or fewer replicas"
        )
    replicas: list[list[int]] = [[] for _ in range(num_replicas)]
    # Work, then number: ties go to the first, so that all ranks share out alike.
    least = [(0.0, replica) for replica in range(num_replicas)]
    for sequence in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        work_ms, replica = heapq.heappop(least)
        replicas[replica].append(sequence)
        length = lengths[sequence]
        heapq.heappush(least, (work_ms + costs.layer_ms(length * length, length), replica))
    return tuple(tuple(sorted(sequences)) for sequences in replicas)
