"""Times and memory of one layer over chunks, against their lengths and their context."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from helixpipe.elastic.chunks import Chunk, Piece
from helixpipe.elastic.costs.fit import Measurement
from helixpipe.layers.elastic.context import ContextStore
from helixpipe.layers.elastic.core_attention import SliceCoreAttention
from helixpipe.layers.elastic.layout import ChunkLayout, spans_of
from helixpipe.layers.spec import Implementation, layer_spec
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

    @property
    def chunk(self) -> Chunk:
        """The first piece ends its sequence, as every other does."""
        first, *rest = self.lengths
        pieces = [Piece(0, self.context, first, self.context + first)]
        pieces += [Piece(sequence, 0, length, length) for sequence, length in enumerate(rest, 1)]
        return Chunk(tuple(pieces))


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


class ElasticLayer(MegatronModule):
    """One layer as stages of elastic pipelines have it, called with one shape of chunk after the other.

    Args:
        config: the model's configuration.
        implementation: whose modules compute the layers, and which attention.
        rotates: whether positions are rotary.
    """

    def __init__(self, config: TransformerConfig, implementation: Implementation, *, rotates: bool) -> None:
        super().__init__(config=config)
        self.contexts = ContextStore()
        spec = layer_spec(config, implementation)
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = partial(
            SliceCoreAttention, contexts=self.contexts, backend=implementation.attention
        )
        self.layer = build_module(spec, config=config, layer_number=1)
        self.rotary: RotaryEmbedding | None = None
        if rotates:
            self.rotary = RotaryEmbedding(
                config.kv_channels,
                rotary_percent=1.0,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=parallel_state.get_context_parallel_group(),
            )

    def forward(self, hidden: Tensor, layout: ChunkLayout) -> Tensor:
        """[T, 1, h], or [T/tp, 1, h] with sequence parallelism, to the same."""
        output: Tensor = self.layer(hidden, attention_mask=None, packed_seq_params=layout)[0]
        return output


def measure_chunks(
    layer: ElasticLayer, shapes: Sequence[Shape], stopwatch: Stopwatch, device: torch.device
) -> tuple[Measurement, ...]:
    """Run ``layer`` over every shape.

    All shapes take turns, round by round, so that what disturbs the machine for a while does not fall on one
    of them, and the fastest round of each counts: other programs can only make one slower.
    """
    chunks = [_LayerOverChunk(layer, shape, device) for shape in shapes]
    rounds: list[list[Times]] = [[] for _ in shapes]
    for number in range(stopwatch.repeats + 1):
        for chunk, times in zip(chunks, rounds, strict=True):
            found = stopwatch.round(chunk, [chunk.hidden()])
            if number:
                times.append(found)
    measured = tuple(
        Measurement(
            context=shape.context,
            lengths=shape.lengths,
            forward_ms=min(found.forward for found in times),
            backward_ms=min(found.backward for found in times),
            bytes=chunk.kept_bytes(),
        )
        for shape, chunk, times in zip(shapes, chunks, rounds, strict=True)
    )
    layer.contexts.clear()
    return measured


class _LayerOverChunk:
    """A layer over one shape of chunk, whose first piece finds keys and values for all of its context."""

    def __init__(self, layer: ElasticLayer, shape: Shape, device: torch.device) -> None:
        self.layer = layer
        self.device = device
        self._chunk = shape.chunk
        positions = [torch.arange(p.start, p.start + p.length) for p in self._chunk.pieces]
        self._layout = ChunkLayout(
            self._chunk.pieces,
            spans_of(self._chunk, self._chunk.tokens),
            torch.cat(positions)[None].to(device),
            layer.rotary,
        )

    def hidden(self) -> Tensor:
        """Hidden states; from now on keys and values of this shape's context lie ready, and no others."""
        config, contexts = self.layer.config, self.layer.contexts
        contexts.clear()
        if self._chunk.context:
            groups = max(1, config.num_query_groups // config.tensor_model_parallel_size)
            shape = (1, groups, self._chunk.context, config.kv_channels)
            whole = Piece(0, 0, self._chunk.context, self._chunk.pieces[0].sequence_length)
            contexts.keep(1, whole, self._random(shape), self._random(shape))
        shared = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return self._random((self._chunk.tokens // shared, 1, config.hidden_size))

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, dtype=self.layer.config.params_dtype, device=self.device)

    def __call__(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.layer(hidden, self._layout)
        return output

    def kept_bytes(self) -> int:
        """Bytes that a forward keeps for its backward, beside weights and the context: others keep these."""
        hidden = self.hidden().requires_grad_()
        known = {tensor.untyped_storage().data_ptr() for tensor in self.layer.parameters()}
        saved = [hidden]

        def note(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            output = self(hidden)
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved
        }
        del output
        return sum(size for pointer, size in storages.items() if pointer not in known)
