"""One stage of Megatron's GPTModel on whatever rank a plan places it."""

from __future__ import annotations

from copy import copy
from typing import Any, NamedTuple

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from helixpipe.layers.gpt import build_gpt
from helixpipe.layers.recomputing_layer import NOTHING_SAVED, MemorySaving
from helixpipe.layers.spec import Implementation


class PositionInChain(NamedTuple):
    """What Megatron's model asks its pipeline group for: where in the chain of stages it is."""

    stage: int
    num_stages: int

    def rank(self) -> int:
        """As a process group says it."""
        return self.stage

    def size(self) -> int:
        """As a process group says it."""
        return self.num_stages


def build_stage(
    config: TransformerConfig,
    implementation: Implementation,
    stage: int,
    num_stages: int,
    *,
    share_embeddings_and_output_weights: bool,
    saving: MemorySaving = NOTHING_SAVED,
    **arguments: Any,
) -> GPTModel:
    """The GPTModel of stage ``stage`` of ``num_stages``, whichever pipeline rank this is.

    Megatron derives a model's layers and ends from its pipeline group, and knows only stages in the order of
    ranks. Here the group that the model sees is the chain of stages; no message is ever sent through it.

    Args:
        config: the model's configuration; the stage gets a copy for ``num_stages`` pipeline ranks.
        implementation: whose modules compute the layers, and which attention.
        stage, num_stages: position in the chain.
        share_embeddings_and_output_weights: must be False.
        saving: what to do to keep less for the backward pass.
        arguments: the rest of GPTModel's.

    Raises:
        ValueError: a tied head, which Megatron keeps equal to the embedding between the first and last ranks.
    """
    if share_embeddings_and_output_weights:
        raise ValueError(
            "two stages per rank need separate weights for embedding and head; "
            "add --untie-embeddings-and-output-weights"
        )
    placed = arguments_in_chain(config, PositionInChain(stage, num_stages))
    return build_gpt(
        placed.pop("config"),
        implementation,
        saving,
        pp_rank=stage,
        share_embeddings_and_output_weights=False,
        **placed,
        **arguments,
    )


def arguments_in_chain(config: TransformerConfig, position: PositionInChain) -> dict[str, Any]:
    """Those arguments of GPTModel that say where a stage is; its configuration is a copy."""
    config = copy(config)
    config.pipeline_model_parallel_size = position.num_stages
    config.virtual_pipeline_model_parallel_size = None
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.pp = position
    groups.embd = None
    return {
        "config": config,
        "pg_collection": groups,
        "pre_process": position.stage == 0,
        "post_process": position.stage == position.num_stages - 1,
    }
