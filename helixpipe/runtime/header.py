"""Headers of messages: a transport that loses count must not become a wrong number.

gloo delivers a message of another size or type without an error, NCCL matches messages by order alone. So
every message ends with four numbers that say which it is and what is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from helixpipe.plan.operation import Operation
from helixpipe.runtime.message import HEADER_WORDS, MessageBuffer, MessageLayout

_DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8,
)  # fmt: skip
# The last number holds a mark by which a header is known, the code of the type, a checksum of the shapes.
_SHAPE_BITS, _MARK_BITS = 32, 48
_MARK = 0x4D58


class Message(NamedTuple):
    """One buffer that crosses ranks.

    Attributes:
        operation: the plan's end of it on this rank.
        tag: the same number at both ends, and at no other message of the iteration.
        layout: of the buffer.
    """

    operation: Operation
    tag: int
    layout: MessageLayout


class HeaderCheck:
    """Writes the headers of one rank's messages and compares those that arrive.

    On the CPU a message is compared when it has been waited for. Elsewhere the host must not wait for the
    device: what arrives is put aside, and compared once by :meth:`finish`. The numbers are made once, and
    reach the device in one copy.

    Args:
        plan_digest: of the plan that both ends follow.
        messages: this rank's, sent and received. Each is named by its index from here on.
        device: where messages are.
    """

    def __init__(self, plan_digest: int, messages: Sequence[Message], device: torch.device) -> None:
        self._messages = messages
        self._is_deferred = device.type != "cpu"
        rows = [_words(plan_digest, message) for message in messages]
        self._expected = torch.tensor(rows, dtype=torch.int64).view(-1, HEADER_WORDS)
        words = self._expected
        if device.type == "cuda":
            words = words.pin_memory().to(device, non_blocking=True)
        self._words = words.unbind()
        self._arrived = torch.zeros_like(words) if self._is_deferred else words[:0]
        self._arrived_rows = self._arrived.unbind()
        self._put_aside: list[int] = []

    def write(self, number: int, buffer: MessageBuffer) -> None:
        """Complete a message that is to be sent."""
        buffer.header.copy_(self._words[number])

    @staticmethod
    def clear(buffer: MessageBuffer) -> None:
        """Before a buffer is received into: memory that is used again may still end with the same header."""
        buffer.header.zero_()

    def compare(self, number: int, buffer: MessageBuffer) -> None:
        """Take note of a message that has arrived.

        Raises:
            ValueError: it is another than the plan expects here.
        """
        if self._is_deferred:
            self._arrived_rows[number].copy_(buffer.header)
            self._put_aside.append(number)
        elif not torch.equal(buffer.header, self._words[number]):
            message = self._messages[number]
            raise ValueError(_complaint(message.operation, _find_header(buffer.data), self._words[number]))

    def finish(self) -> None:
        """Compare what was put aside; waits for the device.

        Raises:
            ValueError: a message was another than the plan expects.
        """
        if not self._put_aside:
            return
        rows, self._put_aside = self._put_aside, []
        arrived, expected = self._arrived.cpu()[rows], self._expected[rows]
        if not torch.equal(arrived, expected):
            row = int((arrived != expected).any(dim=1).nonzero()[0])
            operation = self._messages[rows[row]].operation
            raise ValueError(_complaint(operation, arrived[row], expected[row]))


def _words(plan_digest: int, message: Message) -> list[int]:
    layout = message.layout
    form = _MARK << _MARK_BITS | _DTYPES.index(layout.dtype) << _SHAPE_BITS | layout.checksum
    return [plan_digest, message.tag, layout.num_elements, form]


def _find_header(data: Tensor) -> Tensor:
    """The last header in what has arrived: that of a shorter message is not at the end."""
    words = data.view(torch.int64)
    marks = (words >> _MARK_BITS == _MARK).nonzero().view(-1)
    end = int(marks[-1]) + 1 if len(marks) else len(words)
    return words[max(0, end - HEADER_WORDS) : end]


def _complaint(operation: Operation, found: Tensor, expected: Tensor) -> str:
    return (
        f"message {operation} is not what the plan expects: got {_describe(found)}, expected "
        f"{_describe(expected)}; the ranks run different plans or sizes"
    )


def _describe(header: Tensor) -> str:
    words = header.tolist()
    if len(words) < HEADER_WORDS or words[-1] >> _MARK_BITS != _MARK:
        return "no header where it should be, so nothing or a message of another size"
    plan, tag, num_elements, form = words
    dtype, shapes = form >> _SHAPE_BITS & 0xFFFF, form & ((1 << _SHAPE_BITS) - 1)
    name = str(_DTYPES[dtype]) if dtype < len(_DTYPES) else "of an unknown type"
    return f"{num_elements} elements {name} (shapes {shapes:08x}, number {tag}, plan {plan:015x})"
