"""Times and memory of one layer over chunks, against their lengths and their context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from helixpipe.elastic.fit import Measurement
from helixpipe.layers.attention import causal_attention
from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.layers.spec import LayerPart
from helixpipe.profiling.slice_attention import slice_attention
from helixpipe.profiling.stopwatch import Stopwatch, Times

FEWEST_TOKENS = 256
# Shapes in sixteenths of the longest sequence: whole sequences and packed ones, then slices with a context.
_WHOLE = (
    (1,),
    (2,),
    (3,),
    (4,),
    (6,),
    (8,),
    (12,),
    (16,),
    (1, 1),
    (1, 1, 1, 1),
    (2, 1, 1),
    (4, 2, 2),
    (2,) * 4,
)
_SLICES = ((4, 1), (12, 1), (2, 2), (8, 2), (14, 2), (4, 4), (8, 4), (12, 4), (6, 6), (10, 6), (8, 8))


class Shape(NamedTuple):
    """A chunk: tokens before its first piece, and tokens of each piece."""

    context: int
    lengths: tuple[int, ...]


def chunk_shapes(max_seq_length: int, multiple: int = 1) -> tuple[Shape, ...]:
    """The chunks to measure for sequences of up to ``max_seq_length`` tokens.

    Args:
        max_seq_length: of the longest chunk and its context together.
        multiple: of which chunks must have a number of tokens.

    Raises:
        ValueError: sequences so short that their times would tell nothing.
    """
    if max_seq_length < FEWEST_TOKENS:
        raise ValueError(f"--max-seq-length must be at least {FEWEST_TOKENS}, not {max_seq_length}")
    unit = max_seq_length // 16 // multiple * multiple
    if not unit:
        raise ValueError(f"--max-seq-length must be at least {16 * multiple}, not {max_seq_length}")
    whole = (Shape(0, tuple(part * unit for part in parts)) for parts in _WHOLE)
    slices = (Shape(context * unit, (length * unit,)) for context, length in _SLICES)
    return (*whole, *slices)


def measure_chunks(
    model: SegmentedGPTModel, shapes: Sequence[Shape], stopwatch: Stopwatch, device: torch.device
) -> tuple[Measurement, ...]:
    """Run ``model``'s layer over every shape.

    All shapes take turns, round by round, so that what disturbs the machine for a while does not fall on one
    of them, and the fastest round of each counts: other programs can only make one slower.
    """
    layers = [_ChunkLayer(model, shape, device) for shape in shapes]
    rounds: list[list[Times]] = [[] for _ in shapes]
    for number in range(stopwatch.repeats + 1):
        for layer, times in zip(layers, rounds, strict=True):
            found = stopwatch.round(layer, layer.inputs())
            if number:
                times.append(found)
    return tuple(
        Measurement(
            context=shape.context,
            lengths=shape.lengths,
            forward_ms=min(found.forward for found in times),
            backward_ms=min(found.backward for found in times),
            bytes=layer.kept_bytes(),
        )
        for shape, layer, times in zip(shapes, layers, rounds, strict=True)
    )


class _ChunkLayer:
    """One layer over one shape of chunk."""

    def __init__(self, model: SegmentedGPTModel, shape: Shape, device: torch.device) -> None:
        self.model = model
        self.shape = shape
        self.device = device
        self._layer: Any = model.decoder.layers["0"]

    def inputs(self) -> list[Tensor]:
        """Hidden states [T, 1, h] and, where there is a context, its keys and values [1, groups, C, d]."""
        hidden, key = self.model.edge_shapes(0, sum(self.shape.lengths), 1)[-1:-3:-1]
        shapes = [hidden]
        if self.shape.context:
            shapes += [torch.Size((1, key[2], self.shape.context, key[3]))] * 2
        return [
            torch.randn(shape, dtype=self.model.config.params_dtype, device=self.device) for shape in shapes
        ]

    def __call__(self, hidden: Tensor, *context: Tensor) -> Tensor:
        query, key, value, residual = self.model._run_parts(self._layer, LayerPart.PRE, (hidden,))
        # Else the value would keep the whole of what it is a view of.
        value = value.clone(memory_format=torch.contiguous_format)
        pieces = zip(*(tensor.split(self.shape.lengths) for tensor in (query, key, value)), strict=True)
        output = torch.cat(list(self._attention(pieces, context)))
        return self.model._run_parts(self._layer, LayerPart.POST, (output, residual))[0]

    def _attention(self, pieces: Iterator[tuple[Tensor, ...]], context: Sequence[Tensor]) -> Iterator[Tensor]:
        for number, (query, key, value) in enumerate(pieces):
            if context and not number:
                yield slice_attention(query, key, value, *context)
            else:
                yield causal_attention(query, key, value)

    def kept_bytes(self) -> int:
        """Bytes that a forward keeps for its backward, beside weights and the context: others keep these."""
        inputs = [tensor.requires_grad_() for tensor in self.inputs()]
        known = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *inputs[1:])}
        saved = [inputs[0]]

        def note(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            output = self(*inputs)
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved
        }
        del output
        return sum(size for pointer, size in storages.items() if pointer not in known)
