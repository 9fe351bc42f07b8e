"""One rank's share of a small model, not wrapped for training: Megatron's own and the segmented one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from models import VOCABULARY, Case, _model_arguments, make_config

from helixpipe.layers.gpt import build_gpt
from helixpipe.layers.initialization import deferred_initialization
from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.layers.spec import LOCAL


def configured(case: Case, **values: Any) -> TransformerConfig:
    """The case's configuration with some values set afterwards, where Megatron would refuse them."""
    config = make_config(case)
    for name, value in values.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return config


def gpt_stage(case: Case, vp_stage: int | None = None, **values: Any) -> GPTModel:
    """Megatron's model for this rank's stage, or for one of its virtual stages."""
    config = configured(case, **values)
    ends = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    with deferred_initialization(config):
        return build_gpt(
            config,
            LOCAL,
            case.saving,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            vp_stage=vp_stage,
            **_model_arguments(case),
        )


def segmented_share(case: Case, **values: Any) -> SegmentedGPTModel:
    """This rank's share of the segmented model."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    owned = range(2 * rank, 2 * case.num_layers + 1, 2 * case.pp)
    config = configured(case, **values)
    with deferred_initialization(config):
        return SegmentedGPTModel(
            config,
            LOCAL,
            owned,
            attention_range=case.attention_range,
            lends_head=case.head_placement == "spread",
            saving=case.saving,
            **_model_arguments(case),
        )


def qkv_share(case: Case) -> SegmentedGPTModel:
    """Like :func:`segmented_share` with norm1 and QKV in the attention segments."""
    return segmented_share(replace(case, attention_range="qkv"))


def block_share(case: Case) -> SegmentedGPTModel:
    """Like :func:`segmented_share` with the whole attention block in the attention segments."""
    return segmented_share(replace(case, attention_range="block"))


def run_segments(model: SegmentedGPTModel, **batch: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """The last segment's result, and what each segment before it has returned."""
    values: tuple[torch.Tensor, ...] = ()
    returned = []
    for segment in range(model.num_segments):
        values = model.forward_segment(segment, values, **batch)
        returned.append(values)
    return values[0], returned[:-1]


def batch_of(case: Case) -> dict[str, torch.Tensor]:
    """Tokens, positions and labels of one micro batch, [b, s] each; the same at every call."""
    shape = (case.micro_batch_size, case.seq_length + 1)
    text = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(11))
    positions = torch.arange(case.seq_length).expand(case.micro_batch_size, -1)
    return {"tokens": text[:, :-1], "position_ids": positions, "labels": text[:, 1:]}
