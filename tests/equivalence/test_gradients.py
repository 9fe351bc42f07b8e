"""Helix against Megatron's own schedule functions: same weights, same batch, every loss and gradient.

Megatron's 1F1B (or no pipelining for p=1) runs the stock GPTModel with the same core attention. Measured
errors are about 1e-7 in fp32 and 2e-16 in fp64: only the order in which micro batches are summed differs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from equivalence_worker import compare_one_iteration, compare_training
from models import Case
from ranks import run_on_ranks

# Each gradient tensor: norm of the difference over its norm.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}

LAYOUTS = [
    Case(pp=1),
    Case(pp=2),
    Case(pp=4),
    Case(pp=2, tp=2),
    Case(pp=2, dp=2),
    Case(pp=4, tp=2),
    Case(pp=4, dp=2),
    Case(pp=2, tp=2, dp=2),
]


def cases_of(layout: Case) -> list[Case]:
    """Both styles, folds and rounds; then one option at a time."""
    cases = [
        replace(layout, style=style, fold=fold, rounds=rounds)
        for style in ("gpt", "llama")
        for fold in (1, 2)
        for rounds in (1, 2)
    ]
    cases += [replace(layout, style=style, dtype=torch.float64) for style in ("gpt", "llama")]
    cases += [replace(layout, style=style, overlap=True) for style in ("gpt", "llama")]
    cases += [
        replace(layout, dtype=torch.bfloat16),
        replace(layout, per_token_loss=True),
        replace(layout, style="llama", micro_batch_size=2),
        replace(layout, style="llama", num_layers=8, seq_length=127 + layout.tp % 2, groups=layout.tp),
    ]
    if layout.tp > 1:
        cases += [replace(layout, style=style, sequence_parallel=True) for style in ("gpt", "llama")]
    return cases


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda case: f"pp{case.pp}-tp{case.tp}-dp{case.dp}")
def test_losses_and_gradients_equal_megatrons(layout):
    cases = cases_of(layout)
    for of_rank in run_on_ranks(layout.world_size, compare_one_iteration, cases):
        for case, result in zip(cases, of_rank, strict=True):
            assert result["losses"] == result["reference_losses"], case
            assert not result["missing"], case
            # A gradient of zeros would agree with anything.
            assert result["smallest_norm"] > 1e-3, case
            worst = max(result["errors"], key=result["errors"].get)
            assert result["errors"][worst] <= TOLERANCE[case.dtype], (
                str(case),
                worst,
                result["errors"][worst],
            )
            assert result["trace_is_plan"], case


def test_the_comparison_notices_one_wrong_label():
    case = Case(pp=2)
    result = run_on_ranks(2, compare_one_iteration, [case], True)[0][0]
    assert result["losses"] != result["reference_losses"]
    assert max(result["errors"].values()) > 1e-3


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=4),
        Case(pp=2, tp=2, style="llama", sequence_parallel=True),
        Case(pp=2, dp=2, style="llama", distributed_optimizer=True),
        Case(pp=2, dp=2, distributed_optimizer=True, overlap=True),
        Case(pp=2, dp=2, style="llama", distributed_optimizer=True, overlap=True, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_ten_training_steps_and_an_evaluation_give_the_same_losses(case):
    result = run_on_ranks(case.world_size, compare_training, case, 10)[0]
    reference, helix = result["reference"], result["helix"]
    tolerance = 1e-5 if case.dtype is torch.float32 else 1e-2
    for (expected_losses, expected_norm), (losses, norm) in zip(reference[0], helix[0], strict=True):
        assert losses == pytest.approx(expected_losses, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=tolerance)
    assert helix[1] == pytest.approx(reference[1], rel=tolerance)
    # Training really happened: the first batch's loss moved.
    assert abs(helix[0][-1][0][0] - helix[0][0][0][0]) > 1e-3
