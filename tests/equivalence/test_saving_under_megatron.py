"""Recomputation without attention, chunked MLP and chunked loss under Megatron's own schedule functions.

What makes comparisons of schedules fair: 1F1B and the interleaved schedule keep as little as helix does.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron_schedules_worker import compare_under_megatron
from models import Case
from ranks import run_on_ranks

# Each gradient tensor: norm of the difference over its norm.
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-14}
# Losses are reported in fp32.
LOSS_TOLERANCE = 1e-6


def cases_of(layout: Case) -> list[Case]:
    saving = replace(layout, without_attention=True, mlp_chunk=7, loss_chunk=10, tied=False)
    return [
        replace(layout, without_attention=True, tied=False),
        replace(saving, style="llama", hidden_dropout=0.3),
        replace(saving, dtype=torch.float64, micro_batch_size=2, seq_length=126),
    ]


@pytest.mark.parametrize("virtual_stages", [None, 2], ids=["1f1b", "interleaved"])
@pytest.mark.parametrize(
    "layout",
    [Case(pp=2), pytest.param(Case(pp=2, tp=2, sequence_parallel=True), marks=pytest.mark.slow)],
    ids=["pp2", "pp2-tp2"],
)
def test_losses_and_gradients_stay_and_attention_runs_once(layout, virtual_stages):
    cases = cases_of(layout)
    for of_rank in run_on_ranks(layout.world_size, compare_under_megatron, cases, virtual_stages):
        for case, result in zip(cases, of_rank, strict=True):
            assert result["errors"].pop("losses") <= LOSS_TOLERANCE, case
            worst = max(result["errors"], key=result["errors"].get)
            assert result["errors"][worst] <= TOLERANCE[case.dtype], (str(case), worst, result["errors"])
            # A gradient of zeros would agree with anything.
            assert result["smallest_norm"] > 1e-3, case
            assert result["calls"] == case.num_layers // case.pp * case.num_microbatches, case
