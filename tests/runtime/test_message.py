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


def packed(layout, tensors):
    buffer = layout.empty(torch.device("cpu"))
    buffer.fill(tensors)
    return buffer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_trip(dtype):
    sent = tensors(dtype)
    buffer = packed(layout(dtype), sent)
    assert buffer.data.dtype is dtype
    assert buffer.data.is_contiguous()
    assert layout().num_elements == 30 + 1 + 127 + 1
    payload = layout().num_elements * dtype.itemsize
    assert buffer.data.nbytes == layout(dtype).num_bytes == HEADER_WORDS * 8 + -(-payload // 8) * 8
    buffer.header.copy_(torch.tensor([-1, 2**62, 3, 4]))
    assert buffer.data.view(torch.int64)[-HEADER_WORDS:].tolist() == [-1, 2**62, 3, 4]
    assert [tensor.shape for tensor in buffer.tensors] == [tensor.shape for tensor in sent]
    assert all(torch.equal(a, b) for a, b in zip(buffer.tensors, sent, strict=True))
    assert all(tensor.is_contiguous() for tensor in buffer.tensors)


def test_what_is_kept_and_the_rest_are_buffers_of_their_own():
    shapes = (torch.Size((3, 2)), torch.Size((5,)), torch.Size((4,)))
    whole = MessageLayout(shapes, torch.bfloat16, num_kept=2)
    assert whole.split() == (
        MessageLayout(shapes[:2], torch.bfloat16),
        MessageLayout(shapes[2:], torch.bfloat16),
    )
    assert layout().split() == (layout(),)


def test_tensors_may_be_laid_out_in_any_way():
    whole = torch.arange(24.0).reshape(4, 6)
    sent = [whole.t(), whole[:, ::2]]
    found = packed(layout(shapes=((6, 4), (4, 3))), sent).tensors
    assert all(torch.equal(a, b) for a, b in zip(found, sent, strict=True))


def test_a_buffer_is_filled_by_copies_and_read_by_views():
    """It must not change while it is sent, but a segment may use its output's memory again."""
    sent = tensors()
    buffer = packed(layout(), sent)
    first = sent[0].clone()
    sent[0].zero_()
    assert torch.equal(buffer.tensors[0], first)
    buffer.data.fill_(7)
    assert all((tensor == 7).all() for tensor in buffer.tensors)


def test_the_checksum_is_of_the_shapes():
    assert layout().checksum == layout(torch.bfloat16).checksum
    assert layout(shapes=((2, 3),)).checksum != layout(shapes=((3, 2),)).checksum


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
        layout().check(change(tensors()))


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
    buffer = packed(sent_as, sent)
    buffer.header.fill_(-1)
    assert transformer_engine_takes(*buffer.tensors[:3])
    assert all(torch.equal(a, b) for a, b in zip(buffer.tensors, sent, strict=True))
