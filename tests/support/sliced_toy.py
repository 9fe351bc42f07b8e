"""Small attention layers over slices of sequences, cut at attention, and the same over whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from helixpipe.layers.elastic.context import ContextStore
from helixpipe.layers.elastic.layout import ChunkLayout
from helixpipe.layers.elastic.slice_attention import slice_attention
from helixpipe.megatron_adapter.segments.contexts import SliceContexts
from helixpipe.megatron_adapter.segments.slices import pieces_of
from helixpipe.plan import Plan
from helixpipe.plan.fit import segments_per_layer
from helixpipe.plan.slice_ends import ends_for
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

HIDDEN, HEADS, GROUPS, CHANNELS = 16, 2, 1, 8
WIDTHS = [HEADS * CHANNELS, GROUPS * CHANNELS, GROUPS * CHANNELS]


class SlicedToySegments:
    """One rank's segments of a plan of any range; every rank has all weights, and lends none.

    Args:
        plan: with slice ends.
        rank: this one.
        dtype: of everything.
    """

    lending = None

    def __init__(self, plan: Plan, rank: int, dtype: torch.dtype = torch.float64) -> None:
        self.plan, self.rank, self.dtype = plan, rank, dtype
        self.last = plan.num_segments - 1
        self.per_layer = segments_per_layer(plan)
        self.seq_length = int(str(plan.parameters["slice_ends"]).split(",")[-1])
        self.pieces = pieces_of(plan, ends_for(plan, self.seq_length, 1))
        self.weight_gradients = DeferredWeightGradients()
        self.store = ContextStore()
        shape = partial(_shape, heads=GROUPS)
        starts = [0] * len(self.pieces)
        self.contexts = SliceContexts(plan, rank, self.pieces, starts, self.store, shape, dtype)
        self.weights = make_weights(int(plan.parameters["num_layers"]), dtype)
        self.losses: dict[int, float] = {}

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        length = self.pieces[micro_batch].length
        residual = torch.Size((length, 1, HIDDEN))
        if self.attends(edge):
            return MessageLayout((residual, residual), self.dtype, num_kept=1)
        if not self.attends(edge + 1):
            return MessageLayout((residual,), self.dtype)
        query, key = _shape(length, HEADS), _shape(length, GROUPS)
        return MessageLayout((query, key, key, residual), self.dtype, num_kept=3)

    def forward(self, segment: int, micro_batch: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        piece, layer = self.pieces[micro_batch], segment // self.per_layer
        if self.attends(segment):
            return self._attend(segment, micro_batch, inputs)
        if segment % self.per_layer:
            return self._query_key_value(segment, micro_batch, *inputs)
        part = slice(piece.start, piece.start + piece.length)
        if segment == 0:
            hidden = data_of(piece.sequence, self.seq_length, self.dtype)[part]
        else:
            hidden = inputs[1] + inputs[0] @ self.weights[2 * layer - 1]
        if segment == self.last:
            loss = loss_of(hidden)
            self.losses[micro_batch] = loss.item()
            return (loss,)
        if not self.attends(segment + 1):
            return (hidden,)
        return self._query_key_value(segment, micro_batch, hidden)

    def attends(self, segment: int) -> bool:
        return (segment + 1) % self.per_layer == 0

    def _query_key_value(self, segment: int, micro_batch: int, hidden: Tensor) -> tuple[Tensor, ...]:
        mixed = hidden @ self.weights[2 * (segment // self.per_layer)]
        query, key, value = (tensor.contiguous() for tensor in split(mixed))
        key, value = self.contexts.made(segment, micro_batch, key, value)
        return query, key, value, hidden

    def _attend(self, segment: int, micro_batch: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        query, key, value, residual = inputs
        piece = self.contexts.attended(segment, micro_batch)
        positions = torch.arange(piece.start, piece.start + piece.length)[None]
        layout = ChunkLayout((piece,), ((0, piece.length),), positions)
        layer = (segment + 1) // self.per_layer
        output = slice_attention(query, key, value, layout, self.store, layer=layer)
        if not torch.is_grad_enabled() and not piece.is_continued:
            self.contexts.forget_own(segment, micro_batch)
        return output, residual


def make_weights(num_layers: int, dtype: torch.dtype) -> list[Tensor]:
    """Of QKV and projection, layer by layer."""
    generator = torch.Generator().manual_seed(num_layers)
    shapes = [(HIDDEN, sum(WIDTHS)), (HEADS * CHANNELS, HIDDEN)] * num_layers
    return [
        (torch.randn(*shape, dtype=torch.float64, generator=generator) / 4).to(dtype).requires_grad_()
        for shape in shapes
    ]


def data_of(sequence: int, seq_length: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 + sequence)
    return torch.randn(seq_length, 1, HIDDEN, dtype=torch.float64, generator=generator).to(dtype)


def split(mixed: Tensor) -> list[Tensor]:
    """[T, 1, widths] -> query, key, value [T, 1, heads or groups, d], views of one tensor."""
    return [part.view(*part.shape[:2], -1, CHANNELS) for part in mixed.split(WIDTHS, dim=-1)]


def loss_of(hidden: Tensor) -> Tensor:
    """Of a slice; of a whole sequence the sum of those of its slices."""
    return (hidden.sin() * torch.linspace(0.5, 1.5, HIDDEN, dtype=hidden.dtype)).sum()


def run_whole_sequences(plan: Plan, dtype: torch.dtype = torch.float64) -> tuple[float, list[Tensor]]:
    """Loss over all sequences and gradients, by PyTorch's own attention."""
    weights = make_weights(int(plan.parameters["num_layers"]), dtype)
    seq_length = int(str(plan.parameters["slice_ends"]).split(",")[-1])
    total = 0.0
    for sequence in range(plan.num_sequences):
        hidden = data_of(sequence, seq_length, dtype)
        for before, after in zip(weights[::2], weights[1::2], strict=True):
            heads = [part.permute(1, 2, 0, 3) for part in split(hidden @ before)]
            output = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            hidden = hidden + output.permute(2, 0, 1, 3).flatten(2) @ after
        loss = loss_of(hidden)
        loss.backward()
        total += loss.item()
    return total, [weight.grad for weight in weights]


def collect(ranks: Sequence[Any]) -> tuple[float, list[Tensor]]:
    """Loss and gradients, summed over ranks: each has weights of its own."""
    total = sum(loss for segments in ranks for loss in segments.losses.values())
    gradients = []
    for copies in zip(*(segments.weights for segments in ranks), strict=True):
        found = [weight.grad for weight in copies if weight.grad is not None]
        gradients.append(torch.stack(found).sum(dim=0))
    return total, gradients


def _shape(length: int, heads: int) -> torch.Size:
    return torch.Size((length, 1, heads, CHANNELS))
