"""From sequence lengths to the rounds of elastic helix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm
from typing import NamedTuple

from helixpipe.elastic.chunks import Chunk, Piece
from helixpipe.elastic.costs.chunk_costs import ChunkCosts
from helixpipe.elastic.round_recipe import RoundRecipe
from helixpipe.plan.equal_time import equal_time_end
from helixpipe.plan.schedules.helix import DEFAULT_ATTENTION_RANGE

# A cut closer to a sequence's end than this share of a chunk moves there: a slice would be a sliver.
_SNAP = 0.02
# Kernels compute in tiles of so many tokens. Rounding to them must not make chunks differ by much.
_TILE = 128
_TILES_PER_CHUNK = 16


class _Cut(NamedTuple):
    """Where a chunk ends: so many tokens into a sequence of the round, by its place there."""

    place: int
    token: int


def make_rounds(
    lengths: Sequence[int],
    costs: ChunkCosts,
    num_ranks: int,
    num_rounds: int,
    fold: int,
    recompute: str,
    attention_range: str = DEFAULT_ATTENTION_RANGE,
) -> RoundRecipe:
    """Sequences in rounds of about as many tokens, in chunks whose forwards take equally long.

    Args:
        lengths: tokens of every sequence, at least one each.
        costs: what tells how long a forward takes.
        num_ranks: slots of a round.
        num_rounds: to make at most; a long sequence may leave nothing for some.
        fold: chunks of a slot, where a round has tokens enough.
        recompute: level.
        attention_range: pieces that the attention rank runs.
    """
    chunks: list[Chunk] = []
    rounds: list[tuple[int, ...]] = []
    for members in fill_rounds(lengths, num_rounds):
        own = cut_round([(i, lengths[i]) for i in members], costs, num_ranks * fold)
        # Rounded up: of chunks that do not go round, every so many slots have one more.
        begins = [-(-slot * len(own) // num_ranks) for slot in range(num_ranks + 1)]
        rounds.append(tuple(begins[slot + 1] - begins[slot] for slot in range(num_ranks)))
        chunks += own
    return RoundRecipe(tuple(chunks), tuple(rounds), recompute, attention_range)


def fill_rounds(lengths: Sequence[int], num_rounds: int) -> list[list[int]]:
    """Sequences of each round, the longest first: each where the middle of its tokens falls.

    So sequences of like length share a round, whose chunks then have like shares of attention.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    total = sum(lengths)
    rounds: list[list[int]] = [[] for _ in range(num_rounds)]
    begun = 0
    for i in order:
        rounds[(2 * begun + lengths[i]) * num_rounds // (2 * total)].append(i)
        begun += lengths[i]
    return [members for members in rounds if members]


def cut_round(sequences: Sequence[tuple[int, int]], costs: ChunkCosts, count: int) -> list[Chunk]:
    """Sequences end to end, in at most ``count`` chunks whose forwards take equally long.

    Args:
        sequences: (number in the batch, tokens), in order.
        costs: what tells how long a forward takes.
        count: chunks wanted; there are fewer where sequences are too short.
    """
    chunks: list[Chunk] = []
    place = start = 0
    for end in (*_cuts([length for _, length in sequences], costs, count), _Cut(len(sequences), 0)):
        pieces: list[Piece] = []
        while (place, start) < end:
            number, length = sequences[place]
            stop = end.token if place == end.place else length
            pieces.append(Piece(number, start, stop - start, length))
            place, start = (place, stop) if stop < length else (place + 1, 0)
        if pieces:
            chunks.append(Chunk(tuple(pieces)))
    return chunks


def _cuts(lengths: Sequence[int], costs: ChunkCosts, count: int) -> Iterator[_Cut]:
    """Ends of all chunks but the last."""
    tensor_parallel = costs.tensor_parallel
    fixed = costs.forward.layer_time(0, 0, tensor_parallel)
    linear = costs.forward.layer_time(0, 1, tensor_parallel) - fixed
    attention = costs.forward.layer_time(1, 0, tensor_parallel) - fixed
    times = [attention * length * length + linear * length for length in lengths]
    part = sum(times) / count
    multiple = lcm(_TILE, costs.token_multiple)
    if sum(lengths) < _TILES_PER_CHUNK * multiple * count:
        multiple = costs.token_multiple
    begun, place = 0.0, 0
    for number in range(1, count):
        wanted = part * number
        while place < len(times) - 1 and begun + times[place] < wanted:
            begun += times[place]
            place += 1
        into, left = wanted - begun, begun + times[place] - wanted
        token = multiple * round(equal_time_end(max(into, 0.0), linear, attention) / multiple)
        if into < _SNAP * part or token <= 0:
            yield _Cut(place, 0)
        elif left < _SNAP * part or token >= lengths[place]:
            yield _Cut(place + 1, 0)
        else:
            yield _Cut(place, token)
