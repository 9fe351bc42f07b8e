"""Messages: the tensors of an edge, packed into one contiguous buffer with a header behind them.

The first tensor begins where the buffer begins: Transformer Engine takes queries, keys and values from one
storage only if they fill it from its start, one after the other.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor
from torch._C import _storage_Use_Count

from helixpipe import kernels

# In 64-bit numbers; see helixpipe.runtime.header.
HEADER_WORDS = 4


@dataclass(frozen=True)
class MessageLayout:
    """Shapes and type of the tensors that cross an edge, in order; the gradients have the same.

    Attributes:
        shapes: one per tensor.
        dtype: of all of them.
        num_kept: so many tensors, from the first on, are needed by the backward pass of the segment that
            takes the message; None: all.
    """

    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    num_kept: int | None = None

    @cached_property
    def num_elements(self) -> int:
        """Of all tensors together."""
        return sum(shape.numel() for shape in self.shapes)

    @cached_property
    def num_bytes(self) -> int:
        """Of a buffer: tensors, filled up to whole words, and header."""
        return (self._header_start + HEADER_WORDS) * torch.int64.itemsize

    @cached_property
    def checksum(self) -> int:
        """Of the shapes, in 32 bits: layouts of as many elements may be cut otherwise."""
        return zlib.crc32(repr(self.shapes).encode())

    @cached_property
    def _header_start(self) -> int:
        """In words: the header needs an address that is a multiple of them."""
        return -(-self.num_elements * self.dtype.itemsize // torch.int64.itemsize)

    @cached_property
    def _offsets(self) -> tuple[int, ...]:
        return tuple(accumulate((shape.numel() for shape in self.shapes[:-1]), initial=0))

    @cached_property
    def _strides(self) -> tuple[tuple[int, ...], ...]:
        return tuple(_contiguous_strides(shape) for shape in self.shapes)

    def split(self) -> tuple[MessageLayout, ...]:
        """Layouts of what the backward pass keeps and of the rest, which has a buffer that can be freed."""
        if self.num_kept is None:
            return (self,)
        kept, rest = self.shapes[: self.num_kept], self.shapes[self.num_kept :]
        return MessageLayout(kept, self.dtype), MessageLayout(rest, self.dtype)

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise ``ValueError`` for tensors of other shapes or types.

        A message of the wrong size would be accepted silently by gloo and corrupt the receiver.
        """
        found = tuple(tensor.shape for tensor in tensors)
        if found != self.shapes or any(tensor.dtype is not self.dtype for tensor in tensors):
            raise ValueError(
                f"message holds {[tuple(s) for s in found]} {[t.dtype for t in tensors]}, the plan expects "
                f"{[tuple(s) for s in self.shapes]} {self.dtype}; check sequence length and micro batch size"
            )

    def empty(self, device: torch.device) -> MessageBuffer:
        """A buffer to pack into, or to receive into."""
        words = torch.empty(self._header_start + HEADER_WORDS, dtype=torch.int64, device=device)
        data = words.view(self.dtype)
        views = zip(self.shapes, self._strides, self._offsets, strict=True)
        return MessageBuffer(
            data,
            tuple(data.as_strided(shape, stride, offset) for shape, stride, offset in views),
            words[self._header_start :],
        )


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else ()


class MessageBuffer:
    """One message in memory, with views of its parts.

    Attributes:
        data: all of it, one-dimensional and contiguous.
        tensors: those of the layout.
        header: [HEADER_WORDS].
    """

    __slots__ = ("_own_references", "_storage", "data", "header", "tensors")

    def __init__(self, data: Tensor, tensors: tuple[Tensor, ...], header: Tensor) -> None:
        self.data = data
        self.tensors = tensors
        self.header = header
        self._storage = data.untyped_storage()
        self._own_references = self._num_references()

    def _num_references(self) -> int:
        return _storage_Use_Count(self._storage._cdata)

    @property
    def is_unused(self) -> bool:
        """True unless somebody else has tensors in its memory, be it a graph that keeps them."""
        return self._num_references() == self._own_references

    def views(self) -> tuple[Tensor, ...]:
        """The tensors for somebody else: as long as one of them lives, the buffer is in use.

        They share its version: autograd refuses to read what it has saved of them once the buffer is written
        to again.
        """
        return tuple(tensor.detach() for tensor in self.tensors)

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Copy tensors, which fit the layout, one after the other.

        They are taken as they lie: queries, keys and values are often views of one projection. On a GPU one
        kernel copies such views; everything else is copied faster than that kernel is dispatched.
        """
        if _has_kernel_for(tensors):
            num_elements = sum(tensor.numel() for tensor in tensors)
            kernels.pack(self.data[:num_elements], [tensor.detach() for tensor in tensors])
            return
        for view, tensor in zip(self.tensors, tensors, strict=True):
            view.copy_(tensor.detach() if tensor.requires_grad else tensor)


def _has_kernel_for(tensors: Sequence[Tensor]) -> bool:
    return tensors[0].is_cuda and not all(tensor.is_contiguous() for tensor in tensors)
