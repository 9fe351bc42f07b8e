"""Headers of messages: a transport that loses count must not become a wrong number.

gloo delivers a message of another size or type without an error, NCCL matches messages by order alone. So
every message ends with four numbers that say which it is and what is in it.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from helixpipe.plan.operation import Operation
from helixpipe.runtime.message import HEADER_WORDS, MessageLayout

_DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8,
)  # fmt: skip
# The last number holds a mark by which a header is known, the code of the type, a checksum of the shapes.
_SHAPE_BITS, _MARK_BITS = 32, 48
_MARK = 0x4D58


class HeaderCheck:
    """Writes the headers of one rank's messages and compares those that arrive.

    On the CPU a message is compared when it has been waited for. Elsewhere the host must not wait for the
    device: what arrives is put aside, and compared once by :meth:`finish`.

    Args:
        plan_digest: of the plan that both ends follow.
        num_messages: that arrive in an iteration.
        device: where messages are.
    """

    def __init__(self, plan_digest: int, num_messages: int, device: torch.device) -> None:
        self._plan_digest = plan_digest
        self._device = device
        self._headers: dict[tuple[int, MessageLayout], Tensor] = {}
        self._is_deferred = device.type != "cpu"
        rows = num_messages if self._is_deferred else 0
        self._arrived = torch.zeros(rows, HEADER_WORDS, dtype=torch.int64, device=device)
        self._expected: list[tuple[Operation, Tensor]] = []

    def write(self, tag: int, layout: MessageLayout, buffer: Tensor) -> None:
        """Write the header of a message."""
        layout.header(buffer).copy_(self._header(tag, layout))

    @staticmethod
    def clear(layout: MessageLayout, buffer: Tensor) -> None:
        """Before a buffer is received into: memory that is used again may still end with the same header."""
        layout.header(buffer).zero_()

    def compare(self, message: Operation, tag: int, layout: MessageLayout, buffer: Tensor) -> None:
        """Take note of a message that has arrived.

        Raises:
            ValueError: it is another than the plan expects here.
        """
        expected = self._header(tag, layout)
        if self._is_deferred:
            self._arrived[len(self._expected)].copy_(layout.header(buffer))
            self._expected.append((message, expected))
        elif not torch.equal(layout.header(buffer), expected):
            raise ValueError(_complaint(message, _find_header(buffer), expected))

    def finish(self) -> None:
        """Compare what was put aside; waits for the device.

        Raises:
            ValueError: a message was another than the plan expects.
        """
        if not self._expected:
            return
        arrived = self._arrived[: len(self._expected)].cpu()
        pairs, self._expected = self._expected, []
        wanted = torch.stack([expected for _, expected in pairs]).cpu()
        if not torch.equal(arrived, wanted):
            row = int((arrived != wanted).any(dim=1).nonzero()[0])
            raise ValueError(_complaint(pairs[row][0], arrived[row], wanted[row]))

    def _header(self, tag: int, layout: MessageLayout) -> Tensor:
        key = (tag, layout)
        if key not in self._headers:
            # Of the same number of elements, but cut otherwise.
            shapes = zlib.crc32(repr(layout.shapes).encode())
            form = _MARK << _MARK_BITS | _DTYPES.index(layout.dtype) << _SHAPE_BITS | shapes
            words = [self._plan_digest, tag, layout.num_elements, form]
            self._headers[key] = torch.tensor(words, dtype=torch.int64, device=self._device)
        return self._headers[key]


def _find_header(buffer: Tensor) -> Tensor:
    """The last header in what has arrived: that of a shorter message is not at the end."""
    words = buffer.view(torch.int64)
    marks = (words >> _MARK_BITS == _MARK).nonzero().view(-1)
    end = int(marks[-1]) + 1 if len(marks) else len(words)
    return words[max(0, end - HEADER_WORDS) : end]


def _complaint(message: Operation, found: Tensor, expected: Tensor) -> str:
    return (
        f"message {message} is not what the plan expects: got {_describe(found)}, expected "
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
