"""Chunks: every token once, equal time, tails apart, capacity, and the rules of packing."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.elastic import Chunk, ChunkKind, Piece, ideal_costs
from helixpipe.elastic.baselines import cut_to_size
from helixpipe.elastic.chunk_schedule import order_chunks
from helixpipe.elastic.recipe import Recipe
from helixpipe.elastic.search.sequence_processor import (
    cut,
    equal_time_mesh,
    even_mesh,
    make_chunks,
    pack_to_length,
)

COSTS = ideal_costs(balanced_length=100.0)
batches = st.lists(st.one_of(st.integers(1, 40), st.integers(1, 4096)), min_size=1, max_size=40)


def assert_every_token_once(chunks, lengths):
    """By counting, independently of the recipe's own check, which must agree."""
    seen = {}
    for chunk in chunks:
        for piece in chunk.pieces:
            assert piece.sequence_length == lengths[piece.sequence]
            for token in range(piece.start, piece.start + piece.length):
                key = (piece.sequence, token)
                assert key not in seen
                seen[key] = chunk
    assert len(seen) == sum(lengths)
    ordered = order_chunks(chunks, COSTS)
    Recipe(ordered, (len(ordered),), ((0,) * len(ordered),)).check(lengths)


@given(batches, st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_token_is_in_one_chunk(lengths, num_slices, room):
    longest = max(lengths)
    mesh = equal_time_mesh(longest, min(num_slices, longest), COSTS)
    capacity = max(end - start for start, end in pairwise([0, *mesh])) * room
    chunks = make_chunks(lengths, mesh, COSTS, capacity)
    assert_every_token_once(chunks, lengths)
    assert all(chunk.tokens <= capacity for chunk in chunks)
    assert make_chunks(lengths, mesh, COSTS, capacity) == chunks
    for chunk in chunks:
        # Two tails never meet: only the first piece may be a slice, and it ends its sequence if shared.
        assert all(piece.is_whole for piece in chunk.pieces[1:])
        if chunk.kind is ChunkKind.HYBRID:
            assert not chunk.pieces[0].is_continued


@given(batches, st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_other_chunkings_hold_every_token_once(lengths, num_slices):
    longest = max(lengths)
    assert_every_token_once(pack_to_length(lengths, longest), lengths)
    assert_every_token_once(cut_to_size(lengths, -(-longest // num_slices)), lengths)


@given(st.integers(1, 100000), st.integers(1, 40))
@settings(deadline=None)
def test_mesh_slices_take_equally_long(length, num_slices):
    num_slices = min(num_slices, length)
    mesh = equal_time_mesh(length, num_slices, COSTS)
    assert len(mesh) == num_slices
    assert mesh[-1] == length
    sizes = [end - start for start, end in pairwise([0, *mesh])]
    assert min(sizes) >= 1
    times = [COSTS.layer_ms(e * e - s * s, e - s) for s, e in pairwise([0, *mesh])]
    # Ends are whole tokens: each is at most one away from its place, but for slices of one token.
    token_ms = COSTS.layer_ms(2 * length, 1)
    if min(sizes) > 1:
        assert max(times) - min(times) <= 2 * token_ms


def test_mesh_without_attention_is_even():
    costs = ideal_costs(balanced_length=1e30)
    assert equal_time_mesh(1000, 4, costs) == even_mesh(1000, 4) == (250, 500, 750, 1000)
    with pytest.raises(ValueError, match="3 tokens cannot be cut into 4 slices"):
        equal_time_mesh(3, 4, costs)


def test_cut_leaves_a_tail():
    assert cut(7, 10, (4, 8, 11)) == (
        [Piece(7, 0, 4, 10), Piece(7, 4, 4, 10)],
        Piece(7, 8, 2, 10),
    )
    assert cut(7, 11, (4, 8, 11))[1] is None
    assert cut(7, 3, (4, 8, 11)) == ([], Piece(7, 0, 3, 3))


def test_long_sequences_share_one_mesh_and_shorts_fill_tails():
    costs = ideal_costs(balanced_length=1e30)
    chunks = make_chunks([80, 50, 10, 10, 10], (20, 40, 60, 80), costs, 40)
    kinds = [chunk.kind for chunk in chunks]
    assert kinds == [ChunkKind.SPLIT] * 6 + [ChunkKind.HYBRID, ChunkKind.BATCHED]
    assert chunks[6] == Chunk((Piece(1, 40, 10, 50), Piece(2, 0, 10, 10)))
    assert chunks[7].lengths == (10, 10)


def test_a_short_goes_where_time_per_token_is_least():
    """The tail of the sequence with less context has the smaller ratio, and room in its time."""
    costs = ideal_costs(balanced_length=10.0)
    mesh = equal_time_mesh(100, 4, costs)
    lengths = [100, mesh[0] + 2, mesh[2] + 2, 3]
    chunks = make_chunks(lengths, mesh, costs, 1000)
    assert [c.pieces[0].sequence for c in chunks if c.kind is ChunkKind.HYBRID] == [1]


def test_the_time_target_gives_way_but_capacity_does_not():
    costs = ideal_costs(balanced_length=1e30)
    # 5 x 30 tokens of work fill two chunks of 80 exactly but for fragments: time gives way.
    packed = make_chunks([80, 30, 30, 30, 30, 30], (80,), costs, 1000)
    assert sorted(chunk.tokens for chunk in packed) == [60, 80, 90]
    # With a capacity of 80 tokens a chunk more is opened instead.
    packed = make_chunks([80, 30, 30, 30, 30, 30], (80,), costs, 80)
    assert sorted(chunk.tokens for chunk in packed) == [30, 60, 60, 80]
    with pytest.raises(ValueError, match="slice of 80 tokens does not fit into chunks of at most 79"):
        make_chunks([80], (80,), costs, 79)
