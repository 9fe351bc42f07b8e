"""Megatron's core-attention slot, filled with the attention of chunks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from helixpipe.layers.attention.core import FlashCoreAttention
from helixpipe.layers.elastic.context import ContextStore
from helixpipe.layers.elastic.layout import ChunkLayout
from helixpipe.layers.elastic.positions import rotate_at
from helixpipe.layers.elastic.slice_attention import slice_attention
from helixpipe.layers.rotary import is_rotated


class SliceCoreAttention(FlashCoreAttention):
    """Rotates queries and keys by their positions and attends within the pieces of a chunk.

    Args:
        contexts: keys and values of earlier slices, of this stage.
        arguments: those of :class:`FlashCoreAttention`.

    Raises:
        ValueError: as :class:`FlashCoreAttention`.
    """

    _varies = True

    def __init__(
        self, *args: Any, contexts: ContextStore, pg_collection: Any = None, **arguments: Any
    ) -> None:
        super().__init__(*args, **arguments)
        self.layer_number: int = arguments["layer_number"]
        self._contexts = contexts
        self._context_parallel_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: ChunkLayout | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """[T, 1, heads, d], [T, 1, groups, d] twice -> [T, 1, heads * d].

        The mask argument exists for Megatron's calling convention: the layout says who sees whom.
        """
        layout = packed_seq_params
        assert layout is not None
        assert attention_bias is None
        has_own = self.window and layout.local_rotary is not None
        rotary = layout.local_rotary if has_own else layout.rotary
        if rotary is not None and is_rotated(self.config, self.layer_number):
            query, key = rotate_at(
                query, key, layout.positions, rotary, self.config, self._context_parallel_group
            )
        return slice_attention(
            query,
            key,
            value,
            layout,
            self._contexts,
            layer=self.layer_number,
            scale=self.scale,
            backend=self.backend,
            window=self.window,
            sink=self.sink_for(query, sink),
        )


def attend_to_slices(specs: Iterable[ModuleSpec], contexts: ContextStore, backend: str) -> None:
    """Let layers attend to the slices before theirs.

    Args:
        specs: of whole layers, changed in place.
        contexts: where they keep and find keys and values.
        backend: name of the attention backend, or ``auto``.
    """
    for spec in specs:
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = partial(SliceCoreAttention, contexts=contexts, backend=backend)
