"""Megatron's own GPTModel, whole or one stage of it, with what it does to keep less."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from helixpipe.layers.chunked_loss import chunked_loss
from helixpipe.layers.documents import Documents
from helixpipe.layers.elastic.positions import angles_at
from helixpipe.layers.recomputing_layer import NOTHING_SAVED, MemorySaving
from helixpipe.layers.slices import mark_sliced
from helixpipe.layers.spec import Implementation, block_spec
from helixpipe.layers.variants import apply_variants, output_scale


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
    if implementation.documents:
        model = DocumentGPTModel(saving.loss_chunk_size, config, spec, vp_stage=vp_stage, **arguments)
    elif saving.loss_chunk_size is None:
        model = GPTModel(config, spec, vp_stage=vp_stage, **arguments)
    else:
        model = ChunkedLossGPTModel(saving.loss_chunk_size, config, spec, vp_stage=vp_stage, **arguments)
    apply_variants(model)
    return model


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
            output: Tensor = super()._postprocess(hidden_states, input_ids, position_ids, labels, **others)
            return output
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        scale = output_scale(self.config)

        def loss(labels: Tensor, logits: Tensor) -> Tensor:
            losses: Tensor = self.compute_language_model_loss(
                labels, logits * scale if scale != 1 else logits
            )
            return losses

        return chunked_loss(hidden_states, labels, self.output_layer, weight, loss, size)


class DocumentGPTModel(ChunkedLossGPTModel):
    """Attends within documents, which it is given as packed-sequence parameters; on every stage."""

    def forward(self, *args: Any, packed_seq_params: Documents | None = None, **arguments: Any) -> Any:
        """See GPTModel.

        Raises:
            ValueError: no documents.
        """
        if packed_seq_params is None:
            raise ValueError("the forward step must give every stage the documents of its micro batch")
        return super().forward(*args, packed_seq_params=packed_seq_params, **arguments)

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, *args: Any, packed_seq_params: Documents, **others: Any
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """Megatron's, with rotary positions that begin anew in every document.

        Attention sees no difference between them and positions that go on, but for rounding.
        """
        hidden = self.embedding(input_ids, position_ids) if self.pre_process else None
        angles = None
        if self.position_embedding_type in ("rope", "yarn"):
            angles = angles_at(self.rotary_pos_emb, packed_seq_params.positions)
        return hidden, angles, None, None, None, None
