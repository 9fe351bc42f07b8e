"""Headers: every message that is not the expected one is refused with what was expected and what came."""

import pytest
import torch

from helixpipe.plan import Operation
from helixpipe.runtime.header import HeaderCheck, Message
from helixpipe.runtime.message import MessageLayout

PLAN, TAG = 0x123456789ABCDEF, 40
NO_HEADER = "no header where it should be"
MESSAGE = Operation.parse("3RECV_F2@1")
LAYOUT = MessageLayout((torch.Size((2, 3)),), torch.float32)


def other(shape=(2, 3), dtype=torch.float32):
    return MessageLayout((torch.Size(shape),), dtype)


class Deferred(HeaderCheck):
    """As on a device for which the host must not wait."""

    def __init__(self, plan, messages, device):
        super().__init__(plan, messages, torch.device("meta"))


def message(tag=TAG, layout=LAYOUT):
    return Message(MESSAGE, tag, layout)


def filled(layout, value):
    buffer = layout.empty(torch.device("cpu"))
    buffer.fill([torch.full(shape, value, dtype=layout.dtype) for shape in layout.shapes])
    return buffer


def receive(kind, sent, received=(PLAN, TAG, LAYOUT)):
    """Send with one idea of the message, receive with another; as many bytes as fit arrive."""
    device = torch.device("cpu")
    (plan, tag, layout), (own_plan, own_tag, own_layout) = sent, received
    buffer = filled(layout, 1)
    HeaderCheck(plan, [message(tag, layout)], device).write(0, buffer)
    check = kind(own_plan, [message(own_tag, own_layout)], device)
    # What was received into the same memory before.
    arrived = filled(own_layout, 0)
    check.write(0, arrived)
    check.clear(arrived)
    count = min(buffer.data.nbytes, arrived.data.nbytes)
    arrived.data.view(torch.uint8)[:count] = buffer.data.view(torch.uint8)[:count]
    check.compare(0, arrived)
    check.finish()


@pytest.mark.parametrize("kind", [HeaderCheck, Deferred])
def test_the_expected_message_passes(kind):
    receive(kind, (PLAN, TAG, LAYOUT))


@pytest.mark.parametrize("kind", [HeaderCheck, Deferred])
@pytest.mark.parametrize(
    ("sent", "got"),
    [
        ((PLAN, TAG, other((2, 2))), "got 4 elements torch.float32"),
        ((PLAN, TAG, other((4, 3), torch.bfloat16)), "got 12 elements torch.bfloat16"),
        ((PLAN, TAG, other((3, 2))), "got 6 elements torch.float32"),
        ((PLAN, TAG + 1, LAYOUT), f"number {TAG + 1}, plan"),
        ((PLAN + 1, TAG, LAYOUT), "plan 123456789abcdf0"),
    ],
    ids=["short", "type of as many bytes", "shape", "another message", "another plan"],
)
def test_any_other_message_is_refused(kind, sent, got):
    with pytest.raises(ValueError, match=r"3RECV_F2@1 .* expected 6 elements torch.float32") as error:
        receive(kind, sent)
    if kind is Deferred and sent[2].num_bytes < LAYOUT.num_bytes:
        got = NO_HEADER  # the end of the buffer is all that was put aside
    assert got in str(error.value)


@pytest.mark.parametrize("kind", [HeaderCheck, Deferred])
def test_a_message_whose_end_is_cut_off_is_refused(kind):
    with pytest.raises(ValueError, match=f"got {NO_HEADER}.*expected 6 elements torch.float32"):
        receive(kind, (PLAN, TAG, other((2, 3), torch.float64)))


def test_what_was_never_sent_is_refused():
    check = HeaderCheck(PLAN, [message()], torch.device("cpu"))
    buffer = LAYOUT.empty(torch.device("cpu"))
    check.clear(buffer)
    with pytest.raises(ValueError, match=f"got {NO_HEADER}"):
        check.compare(0, buffer)


def test_deferred_comparison_starts_anew_every_iteration():
    check = Deferred(PLAN, [message(), message(TAG + 1)], torch.device("cpu"))
    for _ in range(3):
        for number in (0, 1):
            buffer = LAYOUT.empty(torch.device("cpu"))
            check.write(number, buffer)
            check.compare(number, buffer)
        check.finish()


def test_deferred_comparison_names_the_message_that_is_wrong():
    other_message = Message(Operation.parse("4RECV_B0@2"), TAG + 1, LAYOUT)
    check = Deferred(PLAN, [message(), other_message], torch.device("cpu"))
    for number, written in ((0, 0), (1, 0)):
        buffer = LAYOUT.empty(torch.device("cpu"))
        check.write(written, buffer)
        check.compare(number, buffer)
    with pytest.raises(ValueError, match=f"4RECV_B0@2 .*number {TAG}.*number {TAG + 1}"):
        check.finish()
