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


@dataclass(frozen=True)
class ChunkLayout:
    """Where the pieces of a chunk are, handed through Megatron's layers as their packed-sequence parameters.

    Attributes:
        pieces: as in the chunk; the first may be a slice that goes on, the last one that is gone on with.
        spans: first and last token (exclusive) of each piece and of the padding, within the chunk.
        positions: [1, T] of every token in its own sequence.
        rotary: makes angles from positions; None for models with learned positions.
        local_rotary: does so in layers with windows, where these have a base of their own.
    """

    pieces: tuple[Piece, ...]
    spans: tuple[tuple[int, int], ...]
    positions: Tensor
    rotary: RotaryEmbedding | None = None
    local_rotary: RotaryEmbedding | None = None

    # Megatron's attention leaves tensors in this format as they are: [T, 1, heads, d].
    qkv_format = "sbhd"

    @property
    def last_span(self) -> tuple[int, int]:
        """First and last token (exclusive) of the last piece; padding may follow."""
        return self.spans[len(self.pieces) - 1]

    @cached_property
    def sequences(self) -> Spans:
        """The spans as attention takes them, once for all layers."""
        return Spans(self.spans)


def padded_length(num_tokens: int, multiple: int) -> int:
    """``num_tokens`` rounded up to a ``multiple``: tensor-parallel ranks share a sequence evenly."""
    return -(-num_tokens // multiple) * multiple


def spans_of(chunk: Chunk, length: int) -> tuple[tuple[int, int], ...]:
    """The spans of a chunk that is padded to ``length`` tokens; padding sees only itself."""
    lengths: Sequence[int] = chunk.lengths
    if length > chunk.tokens:
        lengths = (*lengths, length - chunk.tokens)
    return tuple(pairwise(accumulate(lengths, initial=0)))
