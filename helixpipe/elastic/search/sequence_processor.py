"""From sequence lengths to chunks of equal time (InfiniPipe, arXiv 2509.21275, section 4.3).

The longest sequence is cut into slices that take equally long; every other long sequence is cut on the same
mesh; what is left over at its end, its tail, shares a chunk with short sequences, which fill the remaining
chunks, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil

import numpy as np

from helixpipe.elastic.chunks import Chunk, Piece
from helixpipe.elastic.costs.chunk_costs import ChunkCosts
from helixpipe.plan.equal_time import equal_time_ends

# Sums of times in different orders differ in the last digits; no sequence shall be turned away for that.
_ROUNDING = 1e-9


def equal_time_mesh(length: int, num_slices: int, costs: ChunkCosts) -> tuple[int, ...]:
    """Ends of ``num_slices`` slices of a sequence that take equally long, forward and backward together.

    Raises:
        ValueError: more slices than tokens.
    """
    linear = costs.layer_ms(0, 1) - costs.layer_ms(0, 0)
    attention = costs.layer_ms(1, 0) - costs.layer_ms(0, 0)
    return equal_time_ends(length, num_slices, linear, attention)


def even_mesh(length: int, num_slices: int) -> tuple[int, ...]:
    """Ends of ``num_slices`` slices of a sequence that are equally long."""
    return tuple(length * j // num_slices for j in range(1, num_slices + 1))


def cut(sequence: int, length: int, mesh: Sequence[int]) -> tuple[list[Piece], Piece | None]:
    """A sequence on a mesh: its slices that fill an interval, and what is left over, its tail, or None."""
    ends = [end for end in mesh if end <= length]
    pieces = [
        Piece(sequence, start, end - start, length) for start, end in pairwise([0, *ends]) if end > start
    ]
    covered = ends[-1] if ends else 0
    return pieces, Piece(sequence, covered, length - covered, length) if covered < length else None


def make_chunks(
    lengths: Sequence[int], mesh: Sequence[int], costs: ChunkCosts, token_capacity: int
) -> tuple[Chunk, ...]:
    """Chunks of a batch whose long sequences are cut on ``mesh``, slices of a sequence in order.

    A sequence is long if it reaches beyond the first interval. A mesh of one interval cuts nothing: pure
    packing. The time that a chunk should take is that of the longest sequence's slowest slice.

    Args:
        lengths: tokens of every sequence, at least one each.
        mesh: ends of slices, the last of which is the longest sequence's.
        costs: what tells how long a chunk takes.
        token_capacity: tokens that a chunk may hold.

    Raises:
        ValueError: a slice or a sequence longer than the capacity.
    """
    widest = max(end - start for start, end in pairwise([0, *mesh]))
    if widest > token_capacity:
        raise ValueError(
            f"a slice of {widest} tokens does not fit into chunks of at most {token_capacity} tokens; use "
            "more slices or a larger capacity"
        )
    target_ms = max(
        costs.layer_ms(end * end - start * start, end - start) for start, end in pairwise([0, *mesh])
    )
    chunks: list[Chunk] = []
    tails: list[Piece] = []
    shorts: list[Piece] = []
    for sequence, length in enumerate(lengths):
        pieces, tail = cut(sequence, length, mesh) if length > mesh[0] else ([], None)
        chunks += [Chunk((piece,)) for piece in pieces]
        if tail is not None:
            tails.append(tail)
        if not pieces:
            shorts.append(Piece(sequence, 0, length, length))
    shorts.sort(key=lambda piece: (-piece.length, piece.sequence))
    return (*chunks, *_Packing(tails, costs, target_ms, token_capacity).run(shorts))


def pack_to_length(lengths: Sequence[int], capacity: int) -> tuple[Chunk, ...]:
    """Whole sequences in as few chunks of at most ``capacity`` tokens as first-fit decreasing finds."""
    room: list[int] = []
    members: list[list[Piece]] = []
    for sequence in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[sequence]
        assert length <= capacity
        bucket = next((i for i, free in enumerate(room) if free >= length), len(room))
        if bucket == len(room):
            room.append(capacity)
            members.append([])
        room[bucket] -= length
        members[bucket].append(Piece(sequence, 0, length, length))
    return tuple(Chunk(tuple(pieces)) for pieces in members)


class _Packing:
    """Buckets that short sequences are put into, longest first.

    There is a bucket for every tail, so that two never meet. Others are opened while time blocks, up to the
    number that would do if all took the target's time exactly; from then on the target gives way, and
    a further bucket is opened only where tokens block.
    """

    def __init__(
        self, tails: Sequence[Piece], costs: ChunkCosts, target_ms: float, token_capacity: int
    ) -> None:
        self.costs = costs
        self.target_ms = target_ms * (1 + _ROUNDING)
        self.token_capacity = token_capacity
        self.fixed_ms = costs.layer_ms(0, 0)
        self.pieces: list[list[Piece]] = []
        self.tokens = np.zeros(0)
        self.times = np.zeros(0)
        for tail in tails:
            self._open(tail)

    def run(self, shorts: Sequence[Piece]) -> list[Chunk]:
        """Pack all of ``shorts``, which are sorted."""
        work_ms = sum(self.times) - len(self.times) * self.fixed_ms
        work_ms += sum(self._added_ms(piece) for piece in shorts)
        allowed = ceil(work_ms / max(self.target_ms - self.fixed_ms, 1e-300) - _ROUNDING)
        for piece in shorts:
            self._place(piece, allowed)
        return [Chunk(tuple(pieces)) for pieces in self.pieces]

    def _place(self, piece: Piece, allowed: int) -> None:
        tokens = self.tokens + piece.length
        times = self.times + self._added_ms(piece)
        has_room = tokens <= self.token_capacity
        fits = has_room & (times <= self.target_ms)
        if fits.any():
            # The least time per token: chunks with much attention fill up last.
            ratio = np.where(fits, self.times / self.tokens, np.inf)
            self._add(int(np.argmin(ratio)), piece)
        elif len(self.pieces) < allowed or not has_room.any():
            self._open(piece)
        else:
            bucket = int(np.argmin(np.where(has_room, times, np.inf)))
            self.target_ms = times[bucket]
            self._add(bucket, piece)

    def _added_ms(self, piece: Piece) -> float:
        return self.costs.layer_ms(piece.area, piece.length) - self.fixed_ms

    def _open(self, piece: Piece) -> None:
        if piece.length > self.token_capacity:
            raise ValueError(
                f"a sequence of {piece.length} tokens does not fit into chunks of at most "
                f"{self.token_capacity} tokens; use a larger capacity"
            )
        self.pieces.append([piece])
        self.tokens = np.append(self.tokens, piece.length)
        self.times = np.append(self.times, self.fixed_ms + self._added_ms(piece))

    def _add(self, bucket: int, piece: Piece) -> None:
        self.pieces[bucket].append(piece)
        self.tokens[bucket] += piece.length
        self.times[bucket] += self._added_ms(piece)
