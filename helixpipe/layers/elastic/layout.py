"""What the layers of a stage must know of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from helixpipe.elastic.chunks import Chunk, Piece
from helixpipe.layers.attention.interface import Spans
from helixpipe.layers.documents import Documents


@dataclass(frozen=True)
class ChunkLayout:
    """Where the pieces of a chunk are, handed through Megatron's layers as their packed-sequence parameters.

    Attributes:
        pieces: as in the chunk; the first may be a slice that goes on, the last one that is gone on with.
        spans: first and last token (exclusive) of each piece and of the padding, within the chunk.
        positions: [1, T] of every token in its own sequence.
        rotary: makes angles from positions; None for models with learned positions.
        local_rotary: does so in layers with windows, where these have a base of their own.
        documents: of the only piece, a slice of joined documents, within the chunk; None where pieces are
            what attention ends at.
        seen: tokens of the first document before the chunk, where there are documents.
    """

    pieces: tuple[Piece, ...]
    spans: tuple[tuple[int, int], ...]
    positions: Tensor
    rotary: RotaryEmbedding | None = None
    local_rotary: RotaryEmbedding | None = None
    documents: Spans | None = None
    seen: int = 0

    # Megatron's attention leaves tensors in this format as they are: [T, 1, heads, d].
    qkv_format = "sbhd"

    @property
    def last_span(self) -> tuple[int, int]:
        """First and last token (exclusive) of the last piece; padding may follow."""
        return self.spans[len(self.pieces) - 1]

    @cached_property
    def sequences(self) -> Spans:
        """What attention ends at, as it takes them, once for all layers."""
        return self.documents or Spans(self.spans)

    @property
    def is_one_slice(self) -> bool:
        """True if positions follow each other: there are neither other pieces, padding, nor documents."""
        return self.documents is None and len(self.spans) == 1

    @property
    def context_length(self) -> int:
        """Tokens before the chunk that queries of the first of :attr:`sequences` see, without a window."""
        return self.pieces[0].start if self.documents is None else self.seen


def layout_of_slice(
    piece: Piece,
    positions: Tensor,
    documents: Documents | None = None,
    rotary: RotaryEmbedding | None = None,
    local_rotary: RotaryEmbedding | None = None,
) -> ChunkLayout:
    """The layout of one slice and nothing else.

    Args:
        piece: the slice.
        positions: [1, s] of all tokens of the sequence.
        documents: of which the sequence is joined, and at which attention ends; None for one sequence.
        rotary, local_rotary: see :class:`ChunkLayout`.
    """
    start, end, spans = piece.start, piece.start + piece.length, ((0, piece.length),)
    if documents is None:
        return ChunkLayout((piece,), spans, positions[:, start:end], rotary, local_rotary)
    (row,) = documents.rows
    here = [bounds for bounds in row.bounds if bounds[0] < end and bounds[1] > start]
    inside = Spans([(max(first, start) - start, min(last, end) - start) for first, last in here])
    seen = max(0, start - here[0][0])
    return ChunkLayout((piece,), spans, documents.positions[:, start:end], rotary, local_rotary, inside, seen)


def padded_length(num_tokens: int, multiple: int) -> int:
    """``num_tokens`` rounded up to a ``multiple``: tensor-parallel ranks share a sequence evenly."""
    return -(-num_tokens // multiple) * multiple


def spans_of(chunk: Chunk, length: int) -> tuple[tuple[int, int], ...]:
    """The spans of a chunk that is padded to ``length`` tokens; padding sees only itself."""
    lengths: Sequence[int] = chunk.lengths
    if length > chunk.tokens:
        lengths = (*lengths, length - chunk.tokens)
    return tuple(pairwise(accumulate(lengths, initial=0)))
