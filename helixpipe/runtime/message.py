"""Messages: the tensors of an edge, packed into one contiguous buffer with a header behind them.

The first tensor begins where the buffer begins: Transformer Engine takes queries, keys and values from one
storage only if they fill it from its start, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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

    @property
    def num_elements(self) -> int:
        """Of all tensors together."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def _header_start(self) -> int:
        """The header's first element: its numbers need an address that is a multiple of their size."""
        per_word = torch.int64.itemsize // self.dtype.itemsize
        return -(-self.num_elements // per_word) * per_word

    @property
    def _header_elements(self) -> int:
        return HEADER_WORDS * torch.int64.itemsize // self.dtype.itemsize

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Copy the tensors one after the other into a new buffer.

        Raises:
            ValueError: shapes or types other than the layout's. A message of the wrong size would be
                accepted silently by gloo and corrupt the receiver.
        """
        found = tuple(tensor.shape for tensor in tensors)
        if found != self.shapes or any(tensor.dtype != self.dtype for tensor in tensors):
            raise ValueError(
                f"message holds {[tuple(s) for s in found]} {[t.dtype for t in tensors]}, the plan expects "
                f"{[tuple(s) for s in self.shapes]} {self.dtype}; check sequence length and micro batch size"
            )
        buffer = self.empty(tensors[0].device)
        # As they are: queries, keys and values are often views of one projection.
        kernels.pack(buffer[: self.num_elements], [tensor.detach() for tensor in tensors])
        return buffer

    def empty(self, device: torch.device) -> Tensor:
        """A buffer to receive into."""
        return torch.empty(self._header_start + self._header_elements, dtype=self.dtype, device=device)

    def header(self, buffer: Tensor) -> Tensor:
        """The header's numbers as a view of the buffer, [HEADER_WORDS]."""
        return buffer[self._header_start :].view(torch.int64)

    def drop_rest(self, buffer: Tensor) -> None:
        """Give back the memory of the tensors that are not kept; the others stay where autograd has them."""
        kept = sum(shape.numel() for shape in self.shapes[: self.num_kept])
        buffer.untyped_storage().resize_(kept * self.dtype.itemsize)

    def unpack(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """The tensors as views of the buffer."""
        parts = buffer[: self.num_elements].split([shape.numel() for shape in self.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))
