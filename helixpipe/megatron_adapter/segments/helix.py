"""Segments of a model cut at its attention, fed by Megatron's forward step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import torch

from helixpipe.layers.documents import Documents
from helixpipe.layers.segmented_gpt import SegmentedGPTModel, Tensors
from helixpipe.megatron_adapter.forward_step import (
    IterationInput,
    IterationResult,
    ModelCall,
    StandInModel,
)
from helixpipe.runtime.context_lending import ContextLending
from helixpipe.runtime.lending import WeightLending
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

_PendingCall: TypeAlias = tuple[ModelCall, Callable[..., Any] | None]


class GPTSegments:
    """The computation behind a plan: a segmented model fed by a forward step.

    Args:
        model: the model as the training loop knows it, wrapped or not.
        segmented: the :class:`SegmentedGPTModel` inside.
        seq_length, micro_batch_size: sizes of every micro batch; context parallelism shares its tokens out.
        dtype: of activations and weights.
        weight_gradients: where linear layers leave their weight gradients in plans with W.
        has_loans: whether segments compute with other ranks' weights.
        losses_here: the micro batches whose last segment runs on this rank; all of them if None.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        segmented: SegmentedGPTModel,
        seq_length: int,
        micro_batch_size: int,
        dtype: torch.dtype,
        weight_gradients: DeferredWeightGradients,
        *,
        has_loans: bool = False,
        losses_here: Collection[int] | None = None,
    ) -> None:
        self.segmented = segmented
        self.config = segmented.config
        self.seq_length = seq_length // self.config.context_parallel_size
        self.micro_batch_size = micro_batch_size
        self.dtype = dtype
        self.result = IterationResult()
        self.weight_gradients = weight_gradients
        self.lending: WeightLending | None = None
        self.contexts: ContextLending | None = None
        if has_loans:
            own = next(segmented.parameters())
            gradient_dtype = getattr(own, "main_grad", own).dtype
            self.lending = WeightLending(self._lent_parameters, segmented.lent_shapes, dtype, gradient_dtype)
        # A tied embedding is used by the first segment and by the last, a lent weight by other ranks.
        is_tied = segmented.share_embeddings_and_output_weights and segmented.pre_process
        self.has_shared_weights = is_tied or has_loans
        self._model = model
        self._stand_in = StandInModel(model)
        self._input: IterationInput | None = None
        self._losses_here = None if losses_here is None else frozenset(losses_here)
        self._last_loss = max(losses_here or (), default=None)
        self._num_read = 0
        self._pending: dict[int, _PendingCall] = {}
        # Of micro batches whose attention this rank runs somewhere: of all.
        self._documents: dict[int, Documents] = {}

    def begin(self, iteration: IterationInput) -> None:
        """Take over an iteration's input."""
        self._input = iteration
        self._pending.clear()
        self._documents.clear()
        self._num_read = 0
        self.result = IterationResult()
        if iteration.differentiate:
            iteration.scale_router_losses(self.config, self.segmented)

    def chunk_of(self, segment: int) -> int:
        """The position of the model chunk that holds a segment's weights: there is one."""
        return 0

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        return self._layout(edge, self.seq_length)

    def _layout(self, edge: int, length: int) -> MessageLayout:
        """Of so many tokens."""
        shapes = self.segmented.edge_shapes(edge, length, self.micro_batch_size)
        # A residual beside other tensors comes last. It is only added to something, or passed on.
        return MessageLayout(tuple(shapes), self.dtype, num_kept=len(shapes) - 1 or None)

    def forward(self, segment: int, micro_batch: int, inputs: Tensors) -> Tensors:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        assert self._input is not None
        documents = self._documents_of(micro_batch) if self.segmented.needs_documents else None
        if segment == 0:
            self._read_to(micro_batch + 1)
            call, _ = self._pending[micro_batch]
            if not self._has_loss(micro_batch):
                del self._pending[micro_batch]
            return self.segmented.forward_segment(
                0, (), tokens=call.tokens, position_ids=call.position_ids, layout=documents
            )
        borrowed = None if self.lending is None else self.lending.weights_for(segment, micro_batch)
        if segment < self.segmented.num_segments - 1:
            return self.segmented.forward_segment(segment, inputs, layout=documents, borrowed=borrowed)
        self._read_to(micro_batch + 1)
        call, loss_func = self._pending.pop(micro_batch)
        if micro_batch == self._last_loss:
            # The iterator must stand at the next iteration's first micro batch when this one ends.
            self._read_to(self._input.num_microbatches)
        (output,) = self.segmented.forward_segment(segment, inputs, labels=call.labels, borrowed=borrowed)
        return (self._input.loss(output, loss_func, self.segmented, self.config, self.result),)

    def finish(self) -> None:
        """Check at the end of an iteration that every forward step was used."""
        assert not self._pending, f"micro batches without a loss: {sorted(self._pending)}"

    def _has_loss(self, micro_batch: int) -> bool:
        return self._losses_here is None or micro_batch in self._losses_here

    def _read_to(self, count: int) -> None:
        """Call the forward step for those of the first ``count`` micro batches that are used on this rank.

        The others are passed over, without being read where the iterator can do that.
        """
        assert self._input is not None
        (data_iterator,) = self._input.data_iterators
        skip = getattr(data_iterator, "skip", None)
        while self._num_read < count:
            is_used = self.segmented.pre_process or self._has_loss(self._num_read)
            if is_used or self.segmented.needs_documents:
                call, loss_func = self._next_call(self._num_read)
                if is_used:
                    self._pending[self._num_read] = call, loss_func
                if call.documents is not None:
                    self._documents[self._num_read] = call.documents
            elif skip is not None:
                skip()
            else:
                self._next_call(self._num_read)
            self._num_read += 1

    def _documents_of(self, micro_batch: int) -> Documents:
        self._read_to(micro_batch + 1)
        if micro_batch not in self._documents:
            raise ValueError("the forward step must give the model, on every rank, a micro batch's documents")
        return self._documents[micro_batch]

    def _lent_parameters(self, segment: int) -> list[torch.nn.Parameter]:
        parameters = self.segmented.lent_parameters(segment)
        if getattr(self._model, "use_forward_hook", False):
            # With --overlap-param-gather, modules wait for their parameters when they run; these may be read
            # before that.
            groups: Any = self._model.param_to_bucket_group
            for parameter in parameters:
                groups[parameter].finish_param_sync()
        return parameters

    def _next_call(self, micro_batch: int) -> _PendingCall:
        assert self._input is not None
        (data_iterator,) = self._input.data_iterators
        shape = (self.micro_batch_size, self.seq_length)
        return self._input.call(data_iterator, self._stand_in, shape, micro_batch)
