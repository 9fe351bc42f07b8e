"""Megatron's own GPTModel, whole or one stage of it, with what it does to keep less."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from helixpipe.layers.chunked_loss import chunked_loss
from helixpipe.layers.recomputing_layer import NOTHING_SAVED, MemorySaving
from helixpipe.layers.slices import mark_sliced
from helixpipe.layers.spec import Implementation, block_spec


def build_gpt(
    config: TransformerConfig,
    implementation: Implementation,
    saving: MemorySaving = NOTHING_SAVED,
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    **arguments: Any,
) -> GPTModel:
    """The GPTModel of this rank's stage.

    Args:
        config: the model's configuration.
        implementation: whose modules compute the layers, and which attention.
        saving: what to do to keep less for the backward pass.
        vp_stage: number of the model chunk on this rank in an interleaved schedule.
        pp_rank: place of the stage in the pipeline; this rank's if None.
        arguments: the rest of GPTModel's.
    """
    spec = block_spec(config, implementation, vp_stage, pp_rank, saving)
    if saving.loss_chunk_size is None:
        return GPTModel(config, spec, vp_stage=vp_stage, **arguments)
    return ChunkedLossGPTModel(saving.loss_chunk_size, config, spec, vp_stage=vp_stage, **arguments)


class ChunkedLossGPTModel(GPTModel):
    """Computes losses, where labels are given, without ever holding all logits.

    Args:
        loss_chunk_size: tokens whose logits exist at a time; None: all, as GPTModel does.
        args, arguments: GPTModel's.
    """

    def __init__(self, loss_chunk_size: int | None, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self._loss_chunk_size = loss_chunk_size
        if self.post_process and loss_chunk_size is not None:
            mark_sliced([self.output_layer])

    def _postprocess(
        self, hidden_states: Tensor, input_ids: Tensor, position_ids: Tensor, labels: Tensor, **others: Any
    ) -> Tensor:
        size = self._loss_chunk_size
        if size is None or not self.post_process or labels is None or self.config.mtp_num_layers:
            return super()._postprocess(hidden_states, input_ids, position_ids, labels, **others)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        loss = self.compute_language_model_loss
        return chunked_loss(hidden_states, labels, self.output_layer, weight, loss, size)
