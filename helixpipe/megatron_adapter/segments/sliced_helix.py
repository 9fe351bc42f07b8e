"""Segments of a model cut at its attention, over slices of sequences."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from helixpipe.elastic.chunks import Piece
from helixpipe.layers.elastic.layout import ChunkLayout, layout_of_slice
from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.megatron_adapter.forward_step import IterationInput
from helixpipe.megatron_adapter.segments.contract import IterationSize
from helixpipe.megatron_adapter.segments.sequence_losses import SequenceLosses
from helixpipe.megatron_adapter.segments.shared_slices import SharedSliceSegments
from helixpipe.megatron_adapter.segments.slices import check_documents, part_of, pieces_of
from helixpipe.plan import Kind, Plan
from helixpipe.plan.slice_ends import ends_for
from helixpipe.runtime.executor import Tensors
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.weight_gradients import DeferredWeightGradients


class SlicedGPTSegments(SharedSliceSegments):
    """The computation behind a plan whose micro batches are slices: a segmented model fed by a forward step.

    A forward step is called once for each sequence, with whole tensors, on every rank that has to do with its
    tokens or its loss. Losses are reported on the rank of each sequence's last slice.

    Args:
        model: the model as the training loop knows it, wrapped or not.
        segmented: the :class:`SegmentedGPTModel` inside, built for slices.
        plan: says where slices end, and who reads which keys and values.
        rank: this pipeline rank.
        size: of the iteration, whose micro batches are sequences.
        dtype: of activations and weights.
        weight_gradients: stays empty, as plans of slices have no W.

    Raises:
        ValueError: a plan for other sequences.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        segmented: SegmentedGPTModel,
        plan: Plan,
        rank: int,
        size: IterationSize,
        dtype: torch.dtype,
        weight_gradients: DeferredWeightGradients,
    ) -> None:
        config = segmented.config
        shared = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self._pieces = pieces_of(plan, ends_for(plan, size.seq_length, shared))
        super().__init__(
            model,
            segmented,
            size.seq_length,
            size.micro_batch_size,
            dtype,
            weight_gradients,
            has_loans=bool(plan.loans),
            losses_here={self._pieces[i].sequence for i in plan.losses_of(rank)},
        )
        self.share(plan, rank, self._pieces, [0] * len(self._pieces))
        self._losses = SequenceLosses(plan, rank, segmented, (size.micro_batch_size, size.seq_length))
        # The operation with which a rank has done with a sequence's tensors.
        self._last_uses = {
            self._pieces[op.micro_batch].sequence: (op.segment, op.micro_batch)
            for op in plan.orders[rank]
            if op.kind is Kind.F and op.segment in (0, plan.num_segments - 1)
        }
        self._positions = torch.arange(size.seq_length, device=next(model.parameters()).device)[None]
        # Of slices, each made once for all layers.
        self._layouts: dict[Piece, ChunkLayout] = {}

    def begin(self, iteration: IterationInput) -> None:
        """Take over an iteration's input."""
        super().begin(iteration)
        if self.segmented.needs_documents:
            self._layouts.clear()
        self._losses.begin(iteration)

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        return self._layout(edge, self._pieces[micro_batch].length)

    def forward(self, segment: int, micro_batch: int, inputs: Tensors) -> Tensors:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        borrowed = None if self.lending is None else self.lending.weights_for(segment, micro_batch)
        if self._attends(segment):
            return self._attend(segment, micro_batch, inputs, borrowed)
        piece = self._pieces[micro_batch]
        layout = self._layout_of(piece)
        run = partial(self.segmented.forward_segment, segment, inputs, borrowed=borrowed, layout=layout)
        if segment == self._plan.num_segments - 1:
            call, loss_func = self._call(segment, micro_batch)
            if call.labels is None:
                raise ValueError(
                    "the forward step called the model without labels; slices of sequences need them for "
                    "their losses"
                )
            (losses,) = run(labels=part_of(call.labels, piece))
            return (self._losses.share(piece, losses, loss_func),)
        if segment == 0:
            call, _ = self._call(segment, micro_batch)
            run = partial(
                run, tokens=part_of(call.tokens, piece), position_ids=part_of(call.position_ids, piece)
            )
        outputs = run()
        return self._with_keys_kept(segment, micro_batch, outputs) if self._attends(segment + 1) else outputs

    def finish(self) -> None:
        """Report the losses, and check that every forward step was used."""
        super().finish()
        self._losses.finish(self.result)

    def _attention_layout(self, segment: int, micro_batch: int) -> ChunkLayout:
        return self._layout_of(self._lent.attended(segment, micro_batch))

    def _layout_of(self, piece: Piece) -> ChunkLayout:
        if piece not in self._layouts:
            needs_documents = self.segmented.needs_documents
            documents = self._documents_of(piece.sequence) if needs_documents else None
            self._layouts[piece] = layout_of_slice(piece, self._positions, documents)
        return self._layouts[piece]

    def _next_call(self, micro_batch: int) -> Any:
        call = super()._next_call(micro_batch)
        check_documents(call[0], is_needed=self.segmented.needs_documents)
        return call

    def _call(self, segment: int, micro_batch: int) -> Any:
        """The forward step's call for the sequence of a slice."""
        sequence = self._pieces[micro_batch].sequence
        self._read_to(sequence + 1)
        call = self._pending[sequence]
        if self._last_uses[sequence] == (segment, micro_batch):
            del self._pending[sequence]
        return call
