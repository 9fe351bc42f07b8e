"""Operations: what a rank does, in the text form ``<segment><KIND><micro batch>[@<peer>]``."""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple


class Kind(str, Enum):
    """The kinds of operation.

    ``B`` is the backward pass for the input gradient, or the whole backward pass of a micro batch without
    ``W``; ``W`` is the weight gradient alone. Messages carry activations (``_F``), their gradients (``_B``),
    weights on loan (``_P``, parameters) and the gradients of those (``_G``), keys and values on loan
    (``_K``; ``_KB`` where they are lent once more for the backward pass) and the gradients of those (``_D``).
    """

    F = "F"
    B = "B"
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    SEND_P = "SEND_P"
    RECV_P = "RECV_P"
    SEND_G = "SEND_G"
    RECV_G = "RECV_G"
    SEND_K = "SEND_K"
    RECV_K = "RECV_K"
    SEND_KB = "SEND_KB"
    RECV_KB = "RECV_KB"
    SEND_D = "SEND_D"
    RECV_D = "RECV_D"

    # Operations are keys of many tables; an enumeration would hash its members' names in Python.
    __hash__ = str.__hash__

    @property
    def is_compute(self) -> bool:
        """True for F, B and W."""
        return self in _COMPUTE

    @property
    def is_send(self) -> bool:
        """True for the sending end of a message."""
        return self in _SENDS

    @property
    def is_receive(self) -> bool:
        """True for the receiving end of a message."""
        return self in _RECEIVES


_COMPUTE = frozenset((Kind.F, Kind.B, Kind.W))
_OPPOSITE = {
    Kind.SEND_F: Kind.RECV_F,
    Kind.SEND_B: Kind.RECV_B,
    Kind.SEND_P: Kind.RECV_P,
    Kind.SEND_G: Kind.RECV_G,
    Kind.SEND_K: Kind.RECV_K,
    Kind.SEND_KB: Kind.RECV_KB,
    Kind.SEND_D: Kind.RECV_D,
}
_SENDS = frozenset(_OPPOSITE)
_RECEIVES = frozenset(_OPPOSITE.values())
_OPPOSITE |= {receive: send for send, receive in _OPPOSITE.items()}
_TEXT = re.compile(r"(\d+)((?:SEND|RECV)_(?:KB|[FBPGKD])|F|B|W)(\d+)(?:@(\d+))?", re.ASCII)


class Operation(NamedTuple):
    """One operation of one micro batch.

    Which rank runs it is the plan's placement, not part of its identity. A message is named by the
    edge it crosses: ``segment`` is the producer's for SEND_F/RECV_F, and the segment that consumes the
    gradient for SEND_B/RECV_B, so both directions of the edge ``s -> s+1`` carry the number ``s``.
    The messages of a loan carry the segment that borrows and the loan's first micro batch, those of a
    context the segment that reads and the first micro batch whose keys and values are lent.
    ``peer`` is the other rank of a message and None for compute.
    """

    segment: int
    kind: Kind
    micro_batch: int
    peer: int | None = None

    def __str__(self) -> str:
        text = f"{self.segment}{self.kind.value}{self.micro_batch}"
        return text if self.peer is None else f"{text}@{self.peer}"

    @classmethod
    def parse(cls, text: str) -> Operation:
        """Read the text form back; ``ValueError`` if it is not one."""
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not an operation; expected <segment><KIND><micro batch>, "
                "with @<peer> for messages, like 3F2 or 4SEND_F2@1"
            )
        segment, kind, micro_batch, peer = match.groups()
        operation = cls(int(segment), Kind(kind), int(micro_batch), None if peer is None else int(peer))
        if operation.kind.is_compute != (peer is None):
            rule = "has no peer" if operation.kind.is_compute else "needs its peer, like @1"
            raise ValueError(f"{text!r}: {kind} {rule}")
        return operation

    def counterpart(self, rank: int) -> Operation:
        """The operation at the other end of this message, which is run here by ``rank``."""
        return Operation(self.segment, _OPPOSITE[self.kind], self.micro_batch, rank)


def output_edge(operation: Operation, num_segments: int) -> tuple[int, int] | None:
    """The segments (producer, consumer) of the message that a compute operation gives rise to, or None.

    F feeds the next segment, B the previous one; W feeds nobody.
    """
    if operation.kind is Kind.F and operation.segment + 1 < num_segments:
        return operation.segment, operation.segment + 1
    if operation.kind is Kind.B and operation.segment > 0:
        return operation.segment, operation.segment - 1
    return None


def input_of(operation: Operation, num_segments: int) -> Operation | None:
    """The operation on a neighbouring segment whose result this compute operation consumes, or None."""
    if operation.kind is Kind.F and operation.segment > 0:
        return Operation(operation.segment - 1, Kind.F, operation.micro_batch)
    if operation.kind is Kind.B and operation.segment + 1 < num_segments:
        return Operation(operation.segment + 1, Kind.B, operation.micro_batch)
    return None


def message_of(operation: Operation) -> tuple[Kind, Kind, int]:
    """(send kind, receive kind, edge number) of the message that carries this operation's result."""
    if operation.kind is Kind.F:
        return Kind.SEND_F, Kind.RECV_F, operation.segment
    assert operation.kind is Kind.B
    return Kind.SEND_B, Kind.RECV_B, operation.segment - 1
