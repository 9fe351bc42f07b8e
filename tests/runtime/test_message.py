"""Messages: tensors of an edge in one buffer."""

import re

import pytest
import torch

from helixpipe.runtime.message import HEADER_WORDS, MessageLayout

SHAPES = ((3, 2, 5), (1,), (127, 1), ())


def layout(dtype=torch.float32, shapes=SHAPES):
    return MessageLayout(tuple(torch.Size(shape) for shape in shapes), dtype)


def tensors(dtype=torch.float32):
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_trip(dtype):
    sent = tensors(dtype)
    buffer = layout(dtype).pack(sent)
    assert buffer.dtype is dtype
    assert layout().num_elements == 30 + 1 + 127 + 1
    payload = layout().num_elements * dtype.itemsize
    assert buffer.nbytes == HEADER_WORDS * 8 + -(-payload // 8) * 8
    layout(dtype).header(buffer).copy_(torch.tensor([-1, 2**62, 3, 4]))
    assert layout(dtype).header(buffer).tolist() == [-1, 2**62, 3, 4]
    found = layout(dtype).unpack(buffer)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in sent]
    assert all(torch.equal(a, b) for a, b in zip(found, sent, strict=True))


def test_what_is_not_kept_is_dropped_and_the_rest_stays():
    wanted = MessageLayout(
        (torch.Size((3, 2)), torch.Size((5,)), torch.Size((4,))), torch.bfloat16, num_kept=2
    )
    sent = [torch.randn(shape).to(torch.bfloat16) for shape in wanted.shapes]
    buffer = wanted.pack(sent)
    first, second, _ = wanted.unpack(buffer)
    wanted.drop_rest(buffer)
    assert buffer.untyped_storage().nbytes() == 2 * (6 + 5)
    assert torch.equal(first, sent[0])
    assert torch.equal(second, sent[1])


def test_tensors_may_be_laid_out_in_any_way():
    whole = torch.arange(24.0).reshape(4, 6)
    sent = [whole.t(), whole[:, ::2]]
    wanted = layout(shapes=((6, 4), (4, 3)))
    found = wanted.unpack(wanted.pack(sent))
    assert all(torch.equal(a, b) for a, b in zip(found, sent, strict=True))


def test_pack_copies_and_unpack_does_not():
    sent = tensors()
    buffer = layout().pack(sent)
    first = sent[0].clone()
    sent[0].zero_()
    found = layout().unpack(buffer)
    assert torch.equal(found[0], first)
    assert {tensor.untyped_storage().data_ptr() for tensor in found} == {buffer.untyped_storage().data_ptr()}
    buffer.fill_(7)
    assert all((tensor == 7).all() for tensor in found)


def test_a_single_tensor_is_copied_too():
    """A buffer must not change while it is sent, but a segment may reuse its output's memory."""
    only = torch.randn(3)
    assert layout(shapes=((3,),)).pack([only]).data_ptr() != only.data_ptr()


def test_empty_buffer():
    buffer = layout(torch.bfloat16).empty(torch.device("cpu"))
    assert (buffer.shape, buffer.dtype, buffer.is_contiguous()) == ((160 + 16,), torch.bfloat16, True)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda sent: [sent[0].reshape(5, 2, 3), *sent[1:]], "[(5, 2, 3), (1,), (127, 1), ()]"),
        (lambda sent: [sent[1], sent[0], *sent[2:]], "[(1,), (3, 2, 5), (127, 1), ()]"),
        (lambda sent: sent[:-1], "[(3, 2, 5), (1,), (127, 1)]"),
        (lambda sent: [*sent, sent[0]], "[(3, 2, 5), (1,), (127, 1), (), (3, 2, 5)]"),
        (
            lambda sent: [*sent[:-1], sent[-1].double()],
            "[torch.float32, torch.float32, torch.float32, torch.float64]",
        ),
    ],
    ids=["shape", "order", "missing", "extra", "dtype"],
)
def test_other_tensors_are_refused_with_what_was_found_and_expected(change, found):
    expected = "[(3, 2, 5), (1,), (127, 1), ()] torch.float32"
    with pytest.raises(ValueError, match=f"{re.escape(found)}.*{re.escape(expected)}"):
        layout().pack(change(tensors()))


def transformer_engine_takes(query, key, value):
    """Its rule for tensors of one format: separate storages, or one that they fill in order, from 0."""
    tensors = (query, key, value)
    offsets = [tensor.storage_offset() for tensor in tensors]
    if len({tensor.untyped_storage().data_ptr() for tensor in tensors}) > 1:
        return offsets == [0, 0, 0]
    return offsets == [0, query.numel(), query.numel() + key.numel()]


def test_the_rule_tells_layouts_apart():
    whole = torch.zeros(30)
    parts = whole[:24].split([8, 8, 8])
    assert transformer_engine_takes(*parts)
    assert transformer_engine_takes(*(part.clone() for part in parts))
    assert not transformer_engine_takes(*whole[4:28].split([8, 8, 8]))
    assert not transformer_engine_takes(parts[1], parts[0], parts[2])
    assert not transformer_engine_takes(parts[0].clone(), parts[1], parts[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 127, 128])
def test_transformer_engine_takes_queries_keys_and_values_of_a_message(dtype, tokens):
    heads, groups, channels = 3, 1, 5
    query, key = (tokens, 1, heads, channels), (tokens, 1, groups, channels)
    sent_as = layout(dtype, (query, key, key, (tokens, 1, heads * channels)))
    sent = [torch.randn(shape).to(dtype) for shape in sent_as.shapes]
    buffer = sent_as.pack(sent)
    sent_as.header(buffer).fill_(-1)
    found = sent_as.unpack(buffer)
    assert transformer_engine_takes(*found[:3])
    assert all(torch.equal(a, b) for a, b in zip(found, sent, strict=True))
