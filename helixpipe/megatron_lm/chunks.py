"""Two model chunks on each rank, for schedules that run down the ranks with one and back up with the other.

Megatron builds several chunks for its interleaved schedule only, where they follow the ranks twice. Its
program is let to believe in that one while it builds, and each chunk is the stage that the plan has there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.utils import get_attr_wrapped_model

from helixpipe.layers.stage import PositionInChain, arguments_in_chain
from helixpipe.megatron_adapter.pipeline_group import check_groups
from helixpipe.megatron_adapter.plan_source import PlanOnDemand
from helixpipe.megatron_adapter.schedule import chunk_iterators
from helixpipe.megatron_adapter.segments.stages import check_supported
from helixpipe.megatron_lm.options import Options
from helixpipe.megatron_lm.view import program_arguments, seen_as
from helixpipe.refusals import refuse

# What else cuts a model into stages, of which a plan knows nothing.
_CUTS = (
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)  # fmt: skip


def build_chunk(options: Options, arguments: dict[str, Any]) -> GPTModel:
    """The stage that ``GPTModel(**arguments)``, chunk ``vp_stage`` of this rank, is under the plan.

    Raises:
        ValueError: a model that Megatron would cut in another way, or that has not two chunks on each rank.
    """
    config: TransformerConfig = arguments["config"]
    schedule = options.schedule
    check_groups(arguments["pg_collection"], None, schedule)
    _check(config, arguments, options)
    num_ranks = parallel_state.get_pipeline_model_parallel_world_size()
    plan = PlanOnDemand(schedule, options.plan).plan_for(
        num_layers=config.num_layers,
        num_ranks=num_ranks,
        # Where stages are does not depend on it.
        num_microbatches=num_ranks,
    )
    rank = parallel_state.get_pipeline_model_parallel_rank()
    own = [segment for segment in range(plan.num_segments) if plan.owner_of(segment) == rank]
    position = PositionInChain(own[arguments["vp_stage"]], plan.num_segments)
    placed = arguments_in_chain(config, position)
    check_supported(placed["config"], schedule)
    model: GPTModel = object.__new__(GPTModel)
    model.__init__(**arguments | placed | {"vp_stage": None})
    model.position_in_chain = position
    # The program asks the model for its groups; only its layers need to know of the chain.
    model.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    return model


def _check(config: TransformerConfig, arguments: dict[str, Any], options: Options) -> None:
    schedule = options.schedule
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None:
        raise ValueError(
            f"--pipeline-schedule {schedule} makes two model chunks on each rank by itself; leave the "
            "options of virtual pipeline stages out"
        )
    if arguments["vp_stage"] not in range(options.chunks_per_rank):
        raise ValueError(
            f"--pipeline-schedule {schedule} takes two model chunks on each of at least two pipeline ranks, "
            "built with vp_stage=0 and vp_stage=1; build both, or use a schedule with one chunk"
        )
    if arguments["share_embeddings_and_output_weights"]:
        raise ValueError(
            f"--pipeline-schedule {schedule} needs separate weights for embedding and head; add "
            "--untie-embeddings-and-output-weights"
        )
    if not isinstance(arguments["transformer_layer_spec"], ModuleSpec):
        raise ValueError(
            f"--pipeline-schedule {schedule} takes models whose layers are all alike, one ModuleSpec for all "
            "of them; leave out what makes them differ, or use 1f1b"
        )
    refuse(
        {"experts": config.num_moe_experts is not None},
        f"--pipeline-schedule {schedule} does not support {{}} in this program; leave it out",
    )
    refuse(
        {f"--{name.replace('_', '-')}": bool(getattr(config, name, None)) for name in _CUTS},
        f"--pipeline-schedule {schedule} cuts the model into equal stages; leave {{}} out",
    )


def with_two_chunks(get_model: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron-LM's ``get_model``, which asks its arguments how many chunks to build."""

    @functools.wraps(get_model)
    def build(*args: Any, **options: Any) -> list[torch.nn.Module]:
        program = program_arguments()
        if program.virtual_pipeline_model_parallel_size is None:
            program.virtual_pipeline_model_parallel_size = 2
        try:
            chunks: list[torch.nn.Module] = get_model(*args, **options)
        finally:
            program.virtual_pipeline_model_parallel_size = (
                parallel_state.get_virtual_pipeline_model_parallel_world_size()
            )
        for chunk in chunks:
            # Of no meaning where there are no virtual stages.
            get_attr_wrapped_model(chunk, "vp_stage", return_model_obj=True).vp_stage = None
        return chunks

    return build


def with_two_stages(build_stages: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron-LM's ``build_virtual_pipeline_stages``, which is told how many to build; since 0.18."""

    @functools.wraps(build_stages)
    def build(build_model: Any, groups: Any, vp_size: int | None, *args: Any, **options: Any) -> Any:
        return build_stages(build_model, groups, 2 if vp_size is None else vp_size, *args, **options)

    return build


def iterators_of(data: Any, chunks: list[torch.nn.Module]) -> Any:
    """Data iterators for all chunks, from the program's only one; a list of them is left as it is."""
    if isinstance(data, list):
        return data
    if data is None:
        return [None] * len(chunks)
    # Megatron's own can be asked for the next item only.
    return chunk_iterators(map(next, itertools.repeat(data)), chunks)


def as_own_stage(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a forward step see a pipeline in which its model is one of all stages.

    The chunk with the embedding then reads tokens, the one with the loss labels, on whatever rank.
    """

    @functools.wraps(function)
    def seen(data_iterator: Iterator[Any] | None, model: torch.nn.Module, *args: Any) -> Any:
        with seen_as(*get_attr_wrapped_model(model, "position_in_chain")):
            return function(data_iterator, model, *args)

    return seen
