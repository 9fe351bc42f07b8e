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
    assert buffer.nbytes == HEADER_WORDS * 8 + layout().num_elements * dtype.itemsize
    layout(dtype).header(buffer).copy_(torch.tensor([-1, 2**62, 3, 4]))
    assert layout(dtype).header(buffer).tolist() == [-1, 2**62, 3, 4]
    found = layout(dtype).unpack(buffer)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in sent]
    assert all(torch.equal(a, b) for a, b in zip(found, sent, strict=True))


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
    assert (buffer.shape, buffer.dtype, buffer.is_contiguous()) == ((16 + 159,), torch.bfloat16, True)


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


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_buffer_of_another_size_cannot_be_unpacked(extra):
    with pytest.raises(RuntimeError):
        layout().unpack(torch.zeros(layout().empty(torch.device("cpu")).numel() + extra))
