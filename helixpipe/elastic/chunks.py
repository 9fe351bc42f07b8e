"""Chunks: the micro batches of an elastic pipeline (InfiniPipe, arXiv 2509.21275, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property


class ChunkKind(str, Enum):
    """What a chunk is made of.

    ``BATCHED`` is whole sequences, ``SPLIT`` one slice of a long sequence, ``HYBRID`` slices at its ends
    beside others: the last slice of a sequence, whole ones, and the first slice of another.
    """

    BATCHED = "batched"
    SPLIT = "split"
    HYBRID = "hybrid"


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence.

    Attributes:
        sequence: index into the batch.
        start: the first token; those before it are the piece's context.
        length: tokens of the piece.
        sequence_length: tokens of the whole sequence.
    """

    sequence: int
    start: int
    length: int
    sequence_length: int

    @property
    def is_whole(self) -> bool:
        """True for an uncut sequence."""
        return self.length == self.sequence_length

    @property
    def is_continued(self) -> bool:
        """True if a later piece attends to this one's keys and values."""
        return self.start + self.length < self.sequence_length

    @property
    def area(self) -> int:
        """``(C + s)^2 - C^2``: twice the query-key pairs that causal attention computes."""
        return self.length * (2 * self.start + self.length)


@dataclass(frozen=True)
class Chunk:
    """What passes through the stages as one micro batch.

    Attributes:
        pieces: one slice; or the last slice of a sequence, whole sequences, and the first slice of another,
            any of which may be missing. Elastic 1F1B has no first slices beside others.
    """

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        assert self.pieces, "a chunk holds at least one piece"
        assert all(piece.start == 0 for piece in self.pieces[1:]), "only the first piece may go on"
        assert not any(piece.is_continued for piece in self.pieces[:-1]), "only the last one is gone on with"

    @property
    def kind(self) -> ChunkKind:
        """Batched, split or hybrid."""
        if not self.sliced_sequences:
            return ChunkKind.BATCHED
        return ChunkKind.SPLIT if len(self.pieces) == 1 else ChunkKind.HYBRID

    @property
    def sliced_sequences(self) -> tuple[int, ...]:
        """The sequences that this chunk carries slices of: at most two."""
        return tuple(piece.sequence for piece in self.pieces if not piece.is_whole)

    @property
    def sliced_sequence(self) -> int | None:
        """The long sequence that this chunk, one of elastic 1F1B, carries a slice of, or None."""
        first = self.pieces[0]
        return None if first.is_whole else first.sequence

    @property
    def context(self) -> int:
        """Tokens of earlier slices that the first piece attends to."""
        return self.pieces[0].start

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each piece."""
        return tuple(piece.length for piece in self.pieces)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(piece.length for piece in self.pieces)

    @cached_property
    def area(self) -> int:
        """The sum of the pieces' attention areas: pieces do not see each other."""
        return sum(piece.area for piece in self.pieces)

    @property
    def continued_tokens(self) -> int:
        """Tokens whose keys and values later slices read, and add gradients to."""
        last = self.pieces[-1]
        return last.length if last.is_continued else 0
