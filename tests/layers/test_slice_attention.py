"""Attention of chunks against each sequence's own attention with explicit scores."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from models import Case, make_config
from pretend import pretend_rank
from stand_ins import installed
from stand_ins.aten_kernels import aten_on_cpu
from test_attention import errors, explicit, needs_cuda, torch_math

from helixpipe.elastic import Chunk, Piece
from helixpipe.layers.attention.choice import AUTO, BACKENDS, choose, problem_with
from helixpipe.layers.attention.core import causal_attention
from helixpipe.layers.attention.interface import Spans
from helixpipe.layers.attention.windows import WindowAttention
from helixpipe.layers.documents import Documents
from helixpipe.layers.elastic.context import ContextStore, KeptSlice, alone
from helixpipe.layers.elastic.layout import ChunkLayout, layout_of_slice, padded_length, spans_of
from helixpipe.layers.elastic.positions import angles_at, rotate_at
from helixpipe.layers.elastic.slice_attention import slice_attention

LAYER = 3
DEVICES = [
    pytest.param("cpu", torch.float64, id="cpu-float64"),
    pytest.param("cpu", torch.float32, id="cpu-float32"),
    pytest.param("cpu", torch.bfloat16, id="cpu-bfloat16"),
    pytest.param("cuda", torch.bfloat16, id="flash-bfloat16", marks=needs_cuda),
    pytest.param("cuda", torch.float32, id="efficient-float32", marks=needs_cuda),
]
# (query heads, key/value heads, head size): one each, shared by two, shared by all.
HEADS = [(4, 4, 16), (4, 2, 8), (3, 1, 24)]
# Sequence 0 in four slices, the last of which shares its chunk with two others; then a packed chunk.
LENGTHS = (131, 33, 1, 17, 40)
CUTS = (0, 50, 83, 84, 131)


def whole(sequence):
    return Piece(sequence, 0, LENGTHS[sequence], LENGTHS[sequence])


def chunks_of(cuts=CUTS):
    slices = [Piece(0, first, last - first, LENGTHS[0]) for first, last in pairwise(cuts)]
    return [
        *(Chunk((piece,)) for piece in slices[:-1]),
        Chunk((slices[-1], whole(1), whole(2))),
        Chunk((whole(3), whole(4))),
    ]


def layout_of(chunk, padding=0, device="cpu"):
    positions = torch.cat([torch.arange(p.start, p.start + p.length) for p in chunk.pieces])
    return ChunkLayout(chunk.pieces, spans_of(chunk, chunk.tokens + padding), positions[None].to(device))


def problem(heads, groups, size, dtype=torch.float64, device="cpu"):
    """Query, key, value and the output's gradient of each sequence, exact in ``dtype``."""
    generator = torch.Generator().manual_seed(heads * groups)
    return [
        [
            torch.randn(length, 1, *shape, generator=generator).to(device, dtype)
            for shape in ((heads, size), (groups, size), (groups, size), (heads * size,))
        ]
        for length in LENGTHS
    ]


def rows(tensors, piece):
    return [tensor[piece.start : piece.start + piece.length] for tensor in tensors]


def by_sequence(attention, sequences, dtype):
    """Outputs and gradients of query, key and value, sequence by sequence."""
    results = []
    for sequence in sequences:
        *inputs, grad = (tensor.to(dtype) for tensor in sequence)
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        output = attention(*inputs)
        results.append([output.detach(), *torch.autograd.grad(output, inputs, grad)])
    return results


def by_chunk(sequences, chunks, *, padding=0, contexts=None, checkpoint=False, attention=slice_attention):
    """The same through chunks: forwards in order, backwards from the last to the first."""
    contexts = ContextStore() if contexts is None else contexts
    results = [[torch.zeros_like(t) for t in (s[3], *s[:3])] for s in sequences]
    ran = []
    for chunk in chunks:
        parts = zip(*(rows(sequences[piece.sequence], piece) for piece in chunk.pieces), strict=True)
        query, key, value, grad = (
            torch.cat([*part, *(part[0][:1] for _ in range(padding))]) for part in parts
        )
        inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        layout = layout_of(chunk, padding, query.device)

        def run(*tensors, layout=layout):
            return attention(*tensors, layout, contexts, layer=LAYER)

        if checkpoint:
            output = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=True)
        else:
            output = run(*inputs)
        grad[chunk.tokens :] = 0
        ran.append((chunk, inputs, output, grad))
    for chunk, inputs, output, grad in reversed(ran):
        output.backward(grad)
        first = 0
        for piece in chunk.pieces:
            for found, tensor in zip(
                results[piece.sequence], (output.detach(), *(t.grad for t in inputs)), strict=True
            ):
                rows([found], piece)[0].copy_(tensor[first : first + piece.length])
            first += piece.length
    contexts.assert_empty()
    return results


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("padding", [0, 3])
def test_chunks_give_what_whole_sequences_give(device, dtype, heads, padding):
    sequences = problem(*heads, dtype, device)
    expected = by_sequence(explicit, sequences, torch.float64)
    found = by_chunk(sequences, chunks_of(), padding=padding)
    limits = [[1e-14] * 4] * len(LENGTHS)
    if dtype is not torch.float64:
        # A part more is rounded for each earlier slice, of which there are three at most.
        same = by_sequence(torch_math, sequences, dtype)
        limits = [[2 * e + 1e-7 for e in errors(s, t)] for s, t in zip(same, expected, strict=True)]
    for sequence, (result, wanted, limit) in enumerate(zip(found, expected, limits, strict=True)):
        assert all(tensor.dtype is dtype for tensor in result)
        if LENGTHS[sequence] == 1:
            # One key has all the weight: query and key get no gradient, and numbers near zero no ratio.
            assert max(float(tensor.abs().max()) for tensor in result[1:3]) < 1e-2
            result, wanted, limit = result[::3], wanted[::3], limit[::3]
        for error, most in zip(errors(result, wanted), limit, strict=True):
            assert error <= most, (sequence, errors(result, wanted), limit)


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if not backend.on_cpu])
def test_chunks_through_every_gpu_backend(name):
    """Slices, context, packed sequences and one of a single token, through the libraries' stand-ins."""
    sequences = problem(4, 2, 64, torch.bfloat16)
    expected = by_sequence(explicit, sequences, torch.float64)
    with installed("flash", "engine"), aten_on_cpu():
        attention = partial(slice_attention, backend=BACKENDS[name]())
        found = by_chunk(sequences, chunks_of(), padding=3, attention=attention)
    for sequence, (result, wanted) in enumerate(zip(found, expected, strict=True)):
        tensors = (0, 3) if LENGTHS[sequence] == 1 else range(4)
        for number in tensors:
            # Parts are rounded to 16 bits, each once.
            assert errors([result[number]], [wanted[number]])[0] <= 2**-7


@pytest.mark.parametrize("cuts", [(0, 131), (0, 130, 131), (0, 1, 131), tuple(range(132))])
def test_any_cut_gives_the_same(cuts):
    sequences = problem(4, 2, 8)
    expected = by_sequence(explicit, sequences, torch.float64)
    found = by_chunk(sequences, chunks_of(cuts))
    for result, wanted in zip(found, expected, strict=True):
        for tensor, other in zip(result, wanted, strict=True):
            torch.testing.assert_close(tensor, other, rtol=0, atol=1e-13)


def test_recomputation_keeps_every_slice_once():
    sequences = problem(4, 2, 8)
    expected = by_chunk(sequences, chunks_of())
    contexts = ContextStore()
    kept = []
    original = ContextStore.keep

    class Counting(ContextStore):
        def keep(self, layer, piece, key, value):
            before = len(list(self.tensors()))
            original(self, layer, piece, key, value)
            kept.append((piece.start, len(list(self.tensors())) - before))

    contexts = Counting()
    found = by_chunk(sequences, chunks_of(), contexts=contexts, checkpoint=True)
    for result, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))
    assert kept == [(0, 2), (50, 2), (83, 2), (83, 0), (50, 0), (0, 0)]


def test_packed_sequences_do_not_see_each_other():
    sequences = problem(4, 2, 8, torch.float32)
    expected = by_chunk(sequences, chunks_of())
    for changed in range(len(LENGTHS)):
        others = [
            [tensor + (index == changed) for tensor in sequence] for index, sequence in enumerate(sequences)
        ]
        found = by_chunk(others, chunks_of())
        for index, (result, wanted) in enumerate(zip(found, expected, strict=True)):
            same = all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))
            assert same == (index != changed)


def test_a_changed_context_changes_later_slices_only():
    sequences = problem(4, 2, 8)
    expected = by_chunk(sequences, chunks_of())[0]
    sequences[0][1][60] += 1.0
    found = by_chunk(sequences, chunks_of())[0]
    assert torch.equal(found[0][:50], expected[0][:50])
    # The second slice holds the changed key; the two after it have it as context.
    for first in (60, 83, 84):
        assert (found[0][first] - expected[0][first]).norm() > 1e-4


def test_a_missing_or_repeated_slice_is_noticed():
    sequences, chunks = problem(4, 2, 8), chunks_of()
    with pytest.raises(AssertionError, match="tokens 50 to 83 before a slice of sequence 0 are not kept"):
        by_chunk(sequences, [chunks[0], chunks[2]])
    contexts = ContextStore()
    key = torch.ones(1, 2, 50, 8)
    for chunk in chunks[:2]:
        contexts.keep(LAYER, chunk.pieces[0], key[:, :, : chunk.tokens], key[:, :, : chunk.tokens])
    with pytest.raises(AssertionError, match="a later slice has no gradients yet"):
        contexts.take(LAYER, chunks[0].pieces[0])
    with pytest.raises(AssertionError, match=r"keys and values left .*3.*0"):
        contexts.assert_empty()


def test_without_the_context_the_comparison_fails():
    class Forgetful(ContextStore):
        def earlier(self, layer, piece):
            return super().earlier(layer, piece)[1:]

    sequences = problem(4, 2, 8)
    expected = by_sequence(explicit, sequences, torch.float64)[0]
    with pytest.raises(AssertionError):
        by_chunk(sequences, chunks_of(), contexts=Forgetful())
    found = by_chunk_forward(sequences, chunks_of(), Forgetful())
    assert (found - expected[0]).norm() > 0.1 * expected[0].norm()


def by_chunk_forward(sequences, chunks, contexts):
    """Outputs of sequence 0 alone, without gradients."""
    outputs = []
    for chunk in chunks:
        piece = chunk.pieces[0]
        if piece.sequence == 0:
            with torch.no_grad():
                inputs = rows(sequences[0][:3], piece)
                outputs.append(slice_attention(*inputs, layout_of(Chunk((piece,))), contexts, layer=LAYER))
    return torch.cat(outputs)


def test_what_is_kept_holds_on_to_nothing_else():
    """Queries, keys and values are views of one tensor, as Megatron makes them."""
    contexts = ContextStore()
    piece = Piece(0, 0, 10, 20)
    mixed = torch.randn(12, 1, 4, 4, 8, requires_grad=True)
    layout = layout_of(Chunk((piece,)), padding=2)
    with torch.no_grad():
        query, key, value = mixed[..., :2, :].flatten(2, 3), mixed[..., 2, :], mixed[..., 3, :]
        slice_attention(query, key, value, layout, contexts, layer=LAYER)
    assert [tensor.untyped_storage().nbytes() for tensor in contexts.tensors()] == [4 * 10 * 4 * 8] * 2
    contexts.forget(0)
    contexts.assert_empty()


def test_alone_copies_only_views_of_more():
    tensor = torch.randn(4, 6)
    assert alone(tensor) is tensor
    assert alone(tensor.t()).data_ptr() == tensor.data_ptr()
    part = alone(tensor[1:3])
    assert part.untyped_storage().nbytes() == 2 * 6 * 4
    assert torch.equal(part, tensor[1:3])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("factor", [None, 2.5])
@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_rotation_is_megatrons_at_every_position(interleaved, factor, percent):
    case = Case(pp=1, style="llama")
    config = make_config(case)
    config.rotary_interleaved = interleaved
    with pretend_rank(case):
        rotary = RotaryEmbedding(
            16, percent, interleaved, seq_len_interpolation_factor=factor, use_cpu_initialization=True
        )
        table = rotary(5000)
        positions = torch.cat([torch.arange(4000, 4096), torch.arange(7), torch.arange(3)])[None]
        assert torch.equal(angles_at(rotary, positions), table[positions.view(-1)])
        query = torch.randn(106, 1, 4, 16, dtype=torch.float64, requires_grad=True)
        key = torch.randn(106, 1, 2, 16, dtype=torch.float64, requires_grad=True)
        group = torch.distributed.group.WORLD
        found = rotate_at(query, key, positions, rotary, config, group)
        angles = table[positions.view(-1)]
        expected = [apply_rotary_pos_emb(t, angles, config, cp_group=group) for t in (query, key)]
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        weights = [torch.randn_like(t) for t in found]
        gradients = [torch.autograd.grad(pair, (query, key), weights) for pair in (found, expected)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_padding_rounds_up():
    assert [padded_length(n, 4) for n in (1, 4, 5)] == [4, 4, 8]
    chunk = chunks_of()[-1]
    assert spans_of(chunk, 57) == ((0, 17), (17, 57))
    assert spans_of(chunk, 60) == ((0, 17), (17, 57), (57, 60))


@pytest.mark.parametrize(("dtype", "sums"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_gradients_of_many_slices_are_rounded_once(dtype, sums):
    """Each too small beside the first to change it in 16 bits; together they are half of it."""
    kept = KeptSlice(*torch.zeros(2, 1, 1, 4, 8, dtype=dtype))
    first, small = torch.ones(1, 1, 4, 8, dtype=dtype), torch.full((1, 1, 4, 8), 2.0**-9, dtype=dtype)
    kept.add_gradients(first, first.clone())
    for _ in range(256):
        kept.add_gradients(small, 2 * small)
    assert kept.grad_key.dtype is kept.grad_value.dtype is sums
    assert kept.grad_key.unique().tolist() == [1.5]
    assert kept.grad_value.unique().tolist() == [2.0]


@pytest.mark.parametrize("window", [0, 9, 60])
def test_slices_of_joined_documents_see_their_own(window):
    """Documents that begin in a slice, end with one, are whole in one, and go through two cuts."""
    edges = (0, 20, 21, 45, 83, 90, 131)
    positions = torch.cat([torch.arange(last - first) for first, last in pairwise(edges)])[None]
    documents = Documents((Spans(list(pairwise(edges))),), positions)
    *inputs, grad = problem(4, 2, 8)[0]
    inner = choose(AUTO, problem_with(*(tensor.permute(1, 2, 0, 3) for tensor in inputs[:2]))).backend
    whole = [tensor.detach().requires_grad_() for tensor in inputs]
    expected = causal_attention(
        *whole, backend=WindowAttention(inner, window) if window else inner, documents=documents
    )
    expected.backward(grad)
    contexts, ran = ContextStore(), []
    for first, last in pairwise(CUTS):
        layout = layout_of_slice(Piece(0, first, last - first, LENGTHS[0]), positions, documents)
        parts = [tensor[first:last].detach().requires_grad_() for tensor in inputs]
        output = slice_attention(*parts, layout, contexts, layer=LAYER, window=window)
        torch.testing.assert_close(output, expected[first:last], rtol=1e-12, atol=1e-12)
        ran.append((slice(first, last), parts, output))
    for place, parts, output in reversed(ran):
        output.backward(grad[place])
        for part, tensor in zip(parts, whole, strict=True):
            torch.testing.assert_close(part.grad, tensor.grad[place], rtol=1e-12, atol=1e-12)
    contexts.assert_empty()
