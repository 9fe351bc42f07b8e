"""Keys and values of earlier slices, and the gradients that later slices add to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from helixpipe.elastic.chunks import Piece

_ALL = slice(None)


class _Slot(NamedTuple):
    """What one layer keeps of one sequence belongs together."""

    layer: int
    sequence: int


class KeptSlice:
    """Keys and values of one slice in one layer, and their gradients from later slices.

    Attributes:
        length: tokens of the slice.
        key, value: [1, groups, length, d].
        grad_key, grad_value: sums over the later slices whose backward has run, in fp32 or the keys' own
            wider type; None before the first. A whole sequence's kernel rounds them once, too.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.length = key.shape[2]
        self.key, self.value = key, value
        self.grad_key: Tensor | None = None
        self.grad_value: Tensor | None = None

    def add_gradients(self, grad_key: Tensor, grad_value: Tensor, tokens: slice = _ALL) -> None:
        """Add what one later slice gives to these of the tokens."""
        is_first = self.grad_key is None
        if is_first and grad_key.shape[2] == self.length:
            wide = torch.promote_types(grad_key.dtype, torch.float32)
            self.grad_key, self.grad_value = (grad.to(wide) for grad in (grad_key, grad_value))
            return
        self.expect_gradients()
        for total, grad in zip(self.sums(), (grad_key, grad_value), strict=True):
            total[:, :, tokens].add_(grad)

    def expect_gradients(self) -> None:
        """Have sums that are zero, of a slice of which no later one may have seen anything yet."""
        if self.grad_key is None:
            wide = torch.promote_types(self.key.dtype, torch.float32)
            self.grad_key, self.grad_value = (
                torch.zeros_like(tensor, dtype=wide) for tensor in (self.key, self.value)
            )

    def sums(self) -> tuple[Tensor, Tensor]:
        """The gradients of keys and values, to which a later slice has added."""
        assert self.grad_key is not None, "no later slice's backward has run"
        assert self.grad_value is not None
        return self.grad_key, self.grad_value

    def drop(self) -> None:
        """Let go of keys and values, which nobody reads any more; the gradients stay."""
        self.key = self.value = self.key.new_empty(0)

    def tensors(self) -> Iterator[Tensor]:
        """All that is held."""
        for tensor in (self.key, self.value, self.grad_key, self.grad_value):
            if tensor is not None:
                yield tensor


class ContextStore:
    """Kept slices of one stage, by layer and sequence.

    A slice is kept by its first forward, not again when a layer is recomputed, and leaves with its own
    backward; backwards run from the last slice to the first. In an evaluation, where there are none,
    :meth:`forget` ends a sequence. Slices of other ranks come and leave with messages.
    """

    def __init__(self) -> None:
        self._slices: dict[_Slot, dict[int, KeptSlice]] = {}

    def keep(self, layer: int, piece: Piece, key: Tensor, value: Tensor) -> None:
        """Keep [1, groups, length, d] of a slice for the later ones, unless it is kept already."""
        slices = self._slices.setdefault(_Slot(layer, piece.sequence), {})
        if piece.start not in slices:
            slices[piece.start] = KeptSlice(key, value)

    def earlier(self, layer: int, piece: Piece) -> list[KeptSlice]:
        """The slices before ``piece``, in order; together its whole context."""
        slices = self._slices.get(_Slot(layer, piece.sequence), {})
        found, covered = [], 0
        while covered < piece.start:
            assert covered in slices, (
                f"layer {layer}: tokens {covered} to {piece.start} before a slice of sequence "
                f"{piece.sequence} are not kept"
            )
            found.append(slices[covered])
            covered += slices[covered].length
        assert covered == piece.start
        return found

    def take(self, layer: int, piece: Piece) -> KeptSlice:
        """Give a slice back, in its backward, and forget it."""
        slices = self._slices[_Slot(layer, piece.sequence)]
        assert all(start <= piece.start for start in slices), "a later slice has no gradients yet"
        kept = self.remove(layer, piece)
        assert kept is not None
        return kept

    def find(self, layer: int, piece: Piece) -> KeptSlice:
        """A slice that is kept."""
        return self._slices[_Slot(layer, piece.sequence)][piece.start]

    def drop(self, layer: int, piece: Piece) -> None:
        """Let go of a slice's keys and values, and of the slice unless it has gradients."""
        kept = self.find(layer, piece)
        if kept.grad_key is None:
            self.remove(layer, piece)
        else:
            kept.drop()

    def remove(self, layer: int, piece: Piece) -> KeptSlice | None:
        """Give a slice back and forget it, whatever is kept beside it; None if it is not kept."""
        slot = _Slot(layer, piece.sequence)
        slices = self._slices.get(slot, {})
        kept = slices.pop(piece.start, None)
        if slot in self._slices and not slices:
            del self._slices[slot]
        return kept

    def forget(self, sequence: int) -> None:
        """Drop what is kept of a sequence in all layers."""
        for slot in [slot for slot in self._slices if slot.sequence == sequence]:
            del self._slices[slot]

    def clear(self) -> None:
        """Drop everything."""
        self._slices.clear()

    def tensors(self) -> Iterator[Tensor]:
        """All that is held."""
        for slices in self._slices.values():
            for kept in slices.values():
                yield from kept.tensors()

    def assert_empty(self) -> None:
        """Every slice that was kept has been taken."""
        assert not self._slices, f"keys and values left (layer, sequence): {sorted(self._slices)}"


def alone(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy if it would hold on to a larger storage."""
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
