"""Segments of a model cut at its attention, over the chunks of one batch of documents."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from helixpipe.elastic.chunks import Piece
from helixpipe.elastic.round_recipe import RoundRecipe
from helixpipe.elastic.round_schedule import SCHEDULE
from helixpipe.layers.elastic.layout import ChunkLayout, padded_length, spans_of
from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.megatron_adapter.forward_step import IterationInput
from helixpipe.megatron_adapter.segments.chunks import check_positions, with_token_counts
from helixpipe.megatron_adapter.segments.shared_slices import SharedSliceSegments
from helixpipe.plan import Plan
from helixpipe.refusals import refuse
from helixpipe.runtime.executor import Tensors
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.weight_gradients import DeferredWeightGradients


class RoundSegments(SharedSliceSegments):
    """The computation behind a plan of elastic helix, for one batch.

    The forward step is called for a chunk by the rank that has its tokens and by the one that has its loss,
    with an iterator over that chunk alone.

    Args:
        model: the model as the training loop knows it, wrapped or not.
        segmented: the :class:`SegmentedGPTModel` inside, built for slices.
        batch: what it is to compute.
        plan: of the batch.
        rank: this pipeline rank.
        dtype: of activations and weights.

    Raises:
        ValueError: a plan that is not for this model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        segmented: SegmentedGPTModel,
        batch: ElasticBatch,
        plan: Plan,
        rank: int,
        dtype: torch.dtype,
    ) -> None:
        assert isinstance(batch.recipe, RoundRecipe)
        _check_plan(plan, batch.recipe, segmented)
        check_positions(batch, segmented)
        config, chunks = segmented.config, batch.recipe.chunks
        self._shared = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self._lengths = [padded_length(chunk.tokens, self._shared) for chunk in chunks]
        super().__init__(
            model,
            segmented,
            max(self._lengths),
            1,
            dtype,
            DeferredWeightGradients(),  # stays empty: these plans have no W
            has_loans=bool(plan.loans),
            losses_here=plan.losses_of(rank),
        )
        last = [chunk.pieces[-1] for chunk in chunks]
        self.share(plan, rank, last, [c.tokens - p.length for c, p in zip(chunks, last, strict=True)])
        self._attended: dict[tuple[int, Piece], ChunkLayout] = {}
        self._tensors = batch.assemble(self._shared, next(model.parameters()).device)
        self._layouts = [
            ChunkLayout(chunk.pieces, spans_of(chunk, length), tensors["position_ids"])
            for chunk, length, tensors in zip(chunks, self._lengths, self._tensors, strict=True)
        ]

    def begin(self, iteration: IterationInput) -> None:
        """Take over an iteration's input, of which the data comes from the batch."""
        super().begin(replace(iteration, forward_step_func=with_token_counts(iteration.forward_step_func)))

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        return self._layout(edge, self._lengths[micro_batch])

    def forward(self, segment: int, micro_batch: int, inputs: Tensors) -> Tensors:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        assert self._input is not None
        borrowed = None if self.lending is None else self.lending.weights_for(segment, micro_batch)
        if self._attends(segment):
            return self._attend(segment, micro_batch, inputs, borrowed)
        layout = self._layouts[micro_batch]
        run = partial(self.segmented.forward_segment, segment, inputs, borrowed=borrowed, layout=layout)
        if segment == self._plan.num_segments - 1:
            call, loss_func = self._pending.pop(micro_batch, None) or self._call(micro_batch)
            (losses,) = run(labels=call.labels)
            return (self._input.loss(losses, loss_func, self.segmented, self.config, self.result),)
        if segment == 0:
            call, _ = pending = self._call(micro_batch)
            if self._has_loss(micro_batch):
                self._pending[micro_batch] = pending
            run = partial(run, tokens=call.tokens, position_ids=call.position_ids)
        outputs = run()
        return self._with_keys_kept(segment, micro_batch, outputs) if self._attends(segment + 1) else outputs

    def _attention_layout(self, segment: int, micro_batch: int) -> ChunkLayout:
        """The chunk, whose last piece is gone on with if a later one attends on this rank."""
        layout, last = self._layouts[micro_batch], self._lent.attended(segment, micro_batch)
        if last == layout.pieces[-1]:
            return layout
        # Once for all layers: a layout makes what kernels need of its spans only once.
        if (micro_batch, last) not in self._attended:
            self._attended[micro_batch, last] = replace(layout, pieces=(*layout.pieces[:-1], last))
        return self._attended[micro_batch, last]

    def _call(self, micro_batch: int) -> Any:
        """The forward step's call for a chunk."""
        assert self._input is not None
        data = iter([self._tensors[micro_batch]])
        return self._input.call(data, self._stand_in, (1, self._lengths[micro_batch]), micro_batch)


def _check_plan(plan: Plan, recipe: RoundRecipe, segmented: SegmentedGPTModel) -> None:
    """``ValueError`` unless ``plan`` is for the model."""
    config = segmented.config
    unsupported = {
        "context parallelism": config.context_parallel_size > 1,
        "mixture of experts": config.num_moe_experts is not None,
    }
    refuse(unsupported, f"the {SCHEDULE} schedule does not support {{}}; leave it out or use elastic")
    if plan.num_ranks != config.pipeline_model_parallel_size:
        raise ValueError(
            f"the batch was planned for {plan.num_ranks} ranks, the job has "
            f"{config.pipeline_model_parallel_size}; plan it with the job's pipeline-parallel size"
        )
    if plan.parameters.get("num_layers") != config.num_layers:
        raise ValueError(
            f"the batch was planned for {plan.parameters.get('num_layers')} layers, the model has "
            f"{config.num_layers}; plan it with the model's"
        )
    if segmented.contexts is None or not segmented.lends_head:
        raise ValueError(
            f"{SCHEDULE} needs a model that is built for slices of sequences and lends its head; build it "
            "with contexts and lends_head"
        )
    if segmented.attention_range != recipe.attention_range:
        raise ValueError(
            f"the batch was planned for the attention range {recipe.attention_range}, the model is cut at "
            f"{segmented.attention_range}; plan it with the model's"
        )
    levels = {level.value for level in segmented.saving.levels}
    if levels != {recipe.recompute}:
        raise ValueError(
            f"the batch was planned with {recipe.recompute} recomputed, the model recomputes "
            f"{', '.join(sorted(levels))}; plan it with the model's level"
        )
