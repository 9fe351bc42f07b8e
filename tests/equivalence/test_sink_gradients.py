"""Learned sinks, clamped gates, layers without rotary positions, against Megatron's own schedules."""

from dataclasses import replace

import pytest
import torch
from models import Case
from test_gradients import TOLERANCE, check, layout_name

# Recomputation and slices round the losses otherwise.
LIMITS = (
    {**TOLERANCE, torch.float32: 1e-5, torch.float64: 1e-12},
    {torch.float32: 1e-5, torch.float64: 1e-6},
)


def cases_of(layout):
    # Of few tokens, where sinks have a large share.
    base = replace(layout, style="oss", seq_length=12)
    block = replace(base, attention_range="block")
    cases = [
        replace(base, attention_range="qkv", dtype=torch.float64),
        replace(block, without_attention=True, head_placement="spread"),
        replace(block, overlap=True, rounds=2),
        replace(base, schedule="zb-h1", without_attention=True),
        replace(base, schedule="seq1f1b", num_slices=3, fold=1),
        replace(block, schedule="sliced-helix", fold=1, rounds=0, extra=2, dtype=torch.float64),
        replace(block, schedule="sliced-helix", fold=1, rounds=0, extra=1, head_placement="spread"),
    ]
    if layout.tp > 1:
        cases += [replace(case, sequence_parallel=True) for case in cases[:4]]
    return cases


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [Case(pp=2), Case(pp=4), Case(pp=2, tp=2), Case(pp=2, dp=2)], ids=layout_name
)
def test_losses_and_gradients_equal_megatrons(layout):
    check(cases_of(layout), *LIMITS)
