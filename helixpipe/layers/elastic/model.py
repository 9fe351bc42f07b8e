"""Megatron's GPTModel, or one stage of it, over chunks of different lengths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from megatron.core.transformer import TransformerConfig
from torch import Tensor

from helixpipe.layers.elastic.context import ContextStore
from helixpipe.layers.elastic.core_attention import attend_to_slices
from helixpipe.layers.elastic.layout import ChunkLayout
from helixpipe.layers.experts import check_parts, unsupported_experts
from helixpipe.layers.gpt import ChunkedLossGPTModel
from helixpipe.layers.recomputing_layer import NOTHING_SAVED, MemorySaving
from helixpipe.layers.rotary import POSITIONS
from helixpipe.layers.spec import Implementation, block_spec
from helixpipe.layers.variants import apply_variants, build_local_rotary
from helixpipe.refusals import refuse


class ChunkRun(NamedTuple):
    """How the model is to run the chunk that it is called with next.

    Attributes:
        layout: of the chunk.
        num_checkpointed: how many of this stage's layers, the first ones, keep only their input.
    """

    layout: ChunkLayout
    num_checkpointed: int


class ElasticGPTModel(ChunkedLossGPTModel):
    """Megatron's model, called with one chunk at a time: [1, T] tokens, of which T differs.

    Args:
        contexts: where the stage's layers keep keys and values of slices.
        needs_documents: attention ends at the documents of which sequences are joined.
        args, arguments: those of :class:`ChunkedLossGPTModel`.

    Attributes:
        run: to be set before each call.
        local_rotary: of layers with windows, see :class:`ChunkLayout`.
    """

    run: ChunkRun | None = None

    def __init__(self, contexts: ContextStore, needs_documents: bool, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.contexts, self.needs_documents = contexts, needs_documents
        self.local_rotary = build_local_rotary(self.config, self.pg_collection.cp)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: None = None,
        **arguments: Any,
    ) -> Any:
        """See GPTModel; the next chunk's run says what the positions of its tokens see.

        Raises:
            ValueError: a mask, or documents.
        """
        run, self.run = self.run, None
        assert run is not None, "no run was set for this chunk"
        if attention_mask is not None:
            raise ValueError("the elastic schedule takes no attention mask: pass None, its chunks imply it")
        if packed_seq_params is not None:
            raise ValueError("the elastic schedule joins no documents: pass no packed_seq_params")
        with _whole_layers_recomputed(self.config, run.num_checkpointed if self.training else 0):
            return super().forward(
                input_ids, position_ids, attention_mask, packed_seq_params=run.layout, **arguments
            )

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, *args: Any, **arguments: Any
    ) -> tuple[Tensor | None, None, None, None, None, None]:
        """Megatron's without rotary angles, which the core attention makes from the layout's positions."""
        hidden = self.embedding(input_ids, position_ids) if self.pre_process else None
        return hidden, None, None, None, None, None


@contextmanager
def _whole_layers_recomputed(config: TransformerConfig, count: int) -> Iterator[None]:
    """Let Megatron's block checkpoint its first ``count`` layers, whose number differs between chunks."""
    if not count:
        yield
        return
    assert config.recompute_granularity is None
    config.recompute_granularity, config.recompute_method = "full", "block"
    config.recompute_num_layers = count
    try:
        yield
    finally:
        config.recompute_granularity = config.recompute_method = config.recompute_num_layers = None


def build_elastic_gpt(
    config: TransformerConfig,
    implementation: Implementation,
    saving: MemorySaving = NOTHING_SAVED,
    *,
    recomputes_by_plan: bool = True,
    **arguments: Any,
) -> ElasticGPTModel:
    """The model of this rank's stage for schedules that cut sequences.

    Args:
        config: the model's configuration.
        implementation: whose modules compute the layers, and which attention.
        saving: what to do to keep less beside what plans decide; MLP and loss may run in chunks.
        recomputes_by_plan: the plan says which layers of which chunk are recomputed; False if Megatron's
            arguments do, for all alike.
        arguments: the rest of GPTModel's.

    Raises:
        ValueError: an option that would be ignored or wrong.
    """
    if saving.recomputes:
        raise ValueError("schedules that cut sequences recompute whole layers; leave --recompute-levels out")
    check_supported(config, arguments.get("position_embedding_type", "learned_absolute"), recomputes_by_plan)
    contexts = ContextStore()
    spec = block_spec(config, implementation, saving=saving)
    attend_to_slices(spec.layer_specs, contexts, implementation.attention)
    model = ElasticGPTModel(
        contexts, implementation.documents, saving.loss_chunk_size, config, spec, **arguments
    )
    apply_variants(model, gives_angles=False)
    return model


def check_supported(
    config: TransformerConfig, position_embedding_type: str, recomputes_by_plan: bool = True
) -> None:
    """``ValueError`` for options that models over parts of sequences would ignore or get wrong."""
    unsupported = {
        "recomputation by arguments (the plan decides which layers of which chunk are recomputed)": bool(
            recomputes_by_plan and config.recompute_granularity
        ),
        "context parallelism": config.context_parallel_size > 1,
        **unsupported_experts(config),
        "multi-latent attention": config.multi_latent_attention,
        "multi-token prediction": bool(config.mtp_num_layers),
        "fused QKV rotary positions": config.fused_single_qkv_rope,
        "CUDA graphs": config.cuda_graph_impl != "none",
        f"{position_embedding_type} positions": position_embedding_type not in POSITIONS,
    }
    refuse(unsupported, "schedules that cut sequences do not support {}; leave it out")
    check_parts(config, "a schedule that cuts sequences")
