"""Documents in joined sequences: losses and gradients are those of each document alone, under every schedule.

The document alone goes through Megatron's whole model with its own positions. Errors are about 1e-15.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from documents_worker import compare
from models import Case
from ranks import run_on_ranks

from helixpipe.plan.execution import Execution
from helixpipe.plan.schedules import SCHEDULES

TOLERANCE = 1e-12
LLAMA = Case(pp=2, style="llama", dtype=torch.float64, micro_batch_size=2, documents=True)
GPT = replace(LLAMA, style="gpt", tied=False, micro_batch_size=1)
HELIX = [
    replace(LLAMA, attention_range="block", head_placement="spread", fold=1),
    replace(GPT, attention_range="qkv", without_attention=True, mlp_chunk=7, fold=1),
    replace(LLAMA, without_attention=True, split="planned", interlocked=True, fold=1, rounds=2),
]
MORE_HELIX = [LLAMA, replace(GPT, rounds=2), replace(LLAMA, split="all", attention_range="block")]
STAGES = [
    replace(LLAMA, schedule="zb-h1", fold=1),
    replace(LLAMA, schedule="zb-v", fold=1, rounds=2),
    replace(LLAMA, schedule="1f1b", without_attention=True, fold=1),
]
ALONE = replace(LLAMA, micro_batch_size=1)
# Of one sequence each, in two and four slices and in three.
SLICED = [
    replace(ALONE, schedule="sliced-helix", attention_range="block", fold=1, rounds=0, extra=2),
    replace(GPT, schedule="seq1f1b", num_slices=3, fold=1),
]
MORE_SLICED = [
    replace(GPT, schedule="sliced-helix", fold=2, rounds=0, extra=3, without_attention=True),
    replace(ALONE, schedule="sliced-helix", attention_range="qkv", fold=2, rounds=0, extra=1, mlp_chunk=4),
    replace(ALONE, schedule="sliced-helix", head_placement="spread", resend_context=True, rounds=0, extra=2),
    replace(ALONE, schedule="seq1f1b", num_slices=4, fold=1, rounds=2, recompute="full"),
]
NAMES = sorted(name for name, entry in SCHEDULES.items() if entry.execution is Execution.STAGES)
MORE_STAGES = [replace(case, schedule=name, rounds=2) for name in NAMES for case in (LLAMA, GPT)]


def check(cases, megatrons=False):
    for rank in run_on_ranks(cases[0].world_size, compare, cases, megatrons):
        for case, found in zip(cases, rank, strict=True):
            assert found["documents"] > 3 * case.num_microbatches
            assert found["missing"] == [], found["case"]
            assert found["losses"] < TOLERANCE, found["case"]
            assert found["gradients"] < TOLERANCE, found["case"]


def test_helix_and_megatrons_own_schedule():
    check(HELIX)
    check([replace(GPT, schedule="1f1b", fold=1)], megatrons=True)


def test_schedules_of_stages():
    check(STAGES)


def test_slices_of_joined_documents():
    check(SLICED)


def test_without_documents_the_same_comparison_fails():
    for (found,) in run_on_ranks(2, compare, [replace(LLAMA, documents=False, fold=1)]):
        assert found["losses"] > 1e-3
        assert found["gradients"] > 1e-3


@pytest.mark.slow
@pytest.mark.timeout(1200)  # four ranks, and forty cases
@pytest.mark.parametrize("change", [{}, {"pp": 4, "num_layers": 8}, {"tp": 2, "sequence_parallel": True}])
def test_every_schedule_in_every_layout(change):
    check([replace(case, **change) for case in (*HELIX, *MORE_HELIX)])
    check([replace(case, **change) for case in (*STAGES, *MORE_STAGES)])
    check([replace(case, **change) for case in (*SLICED, *MORE_SLICED)])
    check([replace(LLAMA, schedule="1f1b", **change)], megatrons=True)
