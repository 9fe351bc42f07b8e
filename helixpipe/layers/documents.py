"""Where documents lie in the sequences of a micro batch, for attention that ends with each of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from helixpipe.layers.attention.interface import Spans


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a micro batch, handed through Megatron's layers as their packed-sequence parameters.

    Attributes:
        rows: of each of the b sequences, where documents begin and end.
        positions: [b, s] int64, of every token in its own document.
    """

    rows: tuple[Spans, ...]
    positions: Tensor

    # Megatron's attention leaves tensors in this format as they are: [s, b, heads, d].
    qkv_format = "sbhd"

    def on(self, device: torch.device) -> Documents:
        """The same with positions there, without waiting."""
        if device.type == "cuda":
            return replace(self, positions=self.positions.pin_memory().to(device, non_blocking=True))
        return replace(self, positions=self.positions.to(device))


def documents_of(tokens: Tensor, eod: int) -> Documents:
    """The documents of sequences, each of which ends behind its end token, as in Megatron.

    Args:
        tokens: [b, s], on the host.
        eod: the end token's id.
    """
    ids = tokens.numpy()
    length = ids.shape[1]
    rows = []
    positions = np.empty(ids.shape, dtype=np.int64)
    for row, found in zip(positions, ids, strict=True):
        ends = np.flatnonzero(found == eod) + 1
        edges = np.unique(np.concatenate(([0], ends, [length])))
        row[:] = np.arange(length) - np.repeat(edges[:-1], np.diff(edges))
        rows.append(Spans(list(pairwise(edges.tolist()))))
    return Documents(tuple(rows), torch.from_numpy(positions))
