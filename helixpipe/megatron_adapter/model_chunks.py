"""The model chunks of this rank under a plan, for each way to carry it out."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from helixpipe.elastic.round_schedule import owned_segments
from helixpipe.layers.elastic.context import ContextStore
from helixpipe.layers.elastic.model import build_elastic_gpt
from helixpipe.layers.gpt import build_gpt
from helixpipe.layers.recomputing_layer import MemorySaving
from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.layers.spec import Implementation
from helixpipe.layers.stage import build_stage
from helixpipe.plan import Plan
from helixpipe.plan.execution import Execution
from helixpipe.plan.fit import segments_per_layer, stages_follow_ranks


def build_model_chunks(
    execution: Execution,
    plan: Plan | None,
    config: TransformerConfig,
    implementation: Implementation,
    saving: MemorySaving,
    **arguments: Any,
) -> list[torch.nn.Module]:
    """Build what :func:`helixpipe.megatron_adapter.schedule.make_forward_backward` runs on this rank.

    Args:
        execution: how the plan is carried out.
        plan: of every iteration; None where each batch has its own.
        config: the model's configuration.
        implementation: whose modules compute the layers, and which attention.
        saving: what to do to keep less for the backward pass.
        arguments: the rest of GPTModel's; where each batch has a plan of its own and layers are cut, also the
            ``attention_range``.
    """
    rank = parallel_state.get_pipeline_model_parallel_rank()
    if execution is Execution.ROUNDS:
        ranks, attention_range = config.pipeline_model_parallel_size, arguments["attention_range"]
        owned = owned_segments(config.num_layers, ranks, rank, attention_range)
        arguments |= {"contexts": ContextStore(), "lends_head": True}
        return [SegmentedGPTModel(config, implementation, owned, saving=saving, **arguments)]
    if plan is None or execution is Execution.SLICES:
        arguments["recomputes_by_plan"] = plan is None
        return [build_elastic_gpt(config, implementation, saving, **_ends(), **arguments)]
    owned = [segment for segment in range(plan.num_segments) if plan.owner_of(segment) == rank]
    if execution.cuts_layers:
        if execution.has_slices:
            arguments["contexts"] = ContextStore()
        arguments["attention_range"] = str(plan.parameters["attention_range"])
        arguments["lends_head"] = any(loan.segment == plan.num_segments - 1 for loan in plan.loans)
        # Weights of an attention segment are where those of the segment before it are.
        per_layer = segments_per_layer(plan)
        before_attention = [segment for segment in owned if segment % per_layer == 0]
        return [SegmentedGPTModel(config, implementation, before_attention, saving=saving, **arguments)]
    if execution is Execution.STAGES and not stages_follow_ranks(plan):
        return [
            build_stage(config, implementation, stage, plan.num_segments, saving=saving, **arguments)
            for stage in owned
        ]
    stages = range(len(owned)) if len(owned) > 1 else [None]
    return [
        build_gpt(config, implementation, saving, vp_stage=stage, **_ends(stage), **arguments)
        for stage in stages
    ]


def _ends(stage: int | None = None) -> dict[str, bool]:
    """Which ends of the model are in this rank's stage, or in one of its virtual stages."""
    return {
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
    }
