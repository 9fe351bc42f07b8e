"""Segments of a model cut at its attention whose micro batches read keys and values of others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial

from helixpipe.elastic.chunks import Piece
from helixpipe.layers.elastic.layout import ChunkLayout
from helixpipe.layers.elastic.slice_attention import compact
from helixpipe.megatron_adapter.forward_step import IterationInput
from helixpipe.megatron_adapter.segments.contexts import SliceContexts
from helixpipe.megatron_adapter.segments.helix import GPTSegments
from helixpipe.plan import Plan
from helixpipe.runtime.executor import Tensors


class SharedSliceSegments(GPTSegments):
    """What segments over slices of sequences and those over chunks of documents do alike."""

    _plan: Plan
    _rank: int
    _lent: SliceContexts

    def share(self, plan: Plan, rank: int, pieces: Sequence[Piece], starts: Sequence[int]) -> None:
        """Make ready to lend and to borrow keys and values.

        Args:
            plan: says who reads which.
            rank: this pipeline rank.
            pieces, starts: see :class:`SliceContexts`.
        """
        segmented = self.segmented
        assert segmented.contexts is not None, "the model was built for slices"
        key_shape = partial(segmented.key_shape, micro_batch_size=self.micro_batch_size)
        self._plan = plan
        self._rank = rank
        self._lent = SliceContexts(plan, rank, pieces, starts, segmented.contexts, key_shape, self.dtype)
        self.contexts = self._lent

    def begin(self, iteration: IterationInput) -> None:
        """Take over an iteration's input."""
        super().begin(iteration)
        self._lent.clear()

    @abstractmethod
    def _attention_layout(self, segment: int, micro_batch: int) -> ChunkLayout:
        """A micro batch as attention on this rank sees it."""

    def _attends(self, segment: int) -> bool:
        """Attention is the last segment of a layer."""
        return (segment + 1) % self.segmented.segments_per_layer == 0

    def _attend(self, segment: int, micro_batch: int, inputs: Tensors, borrowed: Tensors | None) -> Tensors:
        assert self._input is not None
        layout = self._attention_layout(segment, micro_batch)
        outputs = self.segmented.forward_segment(segment, inputs, borrowed=borrowed, layout=layout)
        if not self._input.differentiate:
            self._lent.forget_own(segment, micro_batch)
        return outputs

    def _with_keys_kept(self, segment: int, micro_batch: int, outputs: Tensors) -> Tensors:
        """What a segment before attention returns, in tensors that hold no more than themselves."""
        query, key, value, residual = outputs
        if self._plan.rank_of(segment + 1, micro_batch) == self._rank:
            query, key, value = compact(query, key, value)
        key, value = self._lent.made(segment, micro_batch, key, value)
        return query, key, value, residual
