"""Slices over stages against Megatron's own schedule function on whole sequences.

Slices only change the order of sums: measured errors of gradients are below 1e-6 in fp32 and 1e-14 in fp64.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from equivalence_worker import compare_one_iteration, compare_training, compare_with_fp32
from models import Case, sliced_plan
from ranks import run_on_ranks
from test_gradients import check, layout_name, slow

from helixpipe.layers.elastic.context import ContextStore
from helixpipe.plan.slice_ends import slice_ends

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
# Megatron computes the tokens' losses in fp32, whatever the model's type.
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}


def sliced(**values) -> Case:
    """One slice, two slices and more differ by their number alone."""
    return Case(schedule="seq1f1b", fold=1, **values)


def cases_of(layout: Case) -> list[Case]:
    """MHA with learned positions and GQA with rotary ones, in both types, over all numbers of slices."""
    even = 38 if layout.sequence_parallel or layout.tp > 1 else 37
    base = replace(layout, seq_length=even, extra=1)
    cases = [
        replace(base, num_slices=count, style=style, dtype=dtype)
        for count, style, dtype in (
            (1, "gpt", torch.float64),
            (2, "llama", torch.float64),
            (3, "gpt", torch.float64),
            (3, "llama", torch.float32),
            (8, "gpt", torch.float32),
            (8, "llama", torch.float64),
        )
    ]
    cases += [
        replace(base, num_slices=3, micro_batch_size=2, per_token_loss=True),
        replace(base, num_slices=3, style="llama", recompute="full", dtype=torch.float64),
        replace(base, num_slices=2, recompute="selective"),
        replace(base, num_slices=3, overlap=True, tied=False, loss_chunk=10, mlp_chunk=7),
        replace(base, num_slices=8, style="llama", groups=layout.tp),
    ]
    if layout.tp > 1:
        cases += [replace(case, sequence_parallel=True) for case in (cases[2], cases[5], cases[8])]
    return cases


LAYOUTS = [
    sliced(pp=1),
    sliced(pp=2),
    slow(sliced(pp=4)),
    slow(sliced(pp=2, dp=2)),
    slow(sliced(pp=2, tp=2)),
    slow(sliced(pp=1, tp=2)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_losses_and_gradients_equal_megatrons(layout):
    check(cases_of(layout), TOLERANCE, LOSS_TOLERANCE)


def test_in_bf16_slices_are_as_near_to_the_truth_as_megatron():
    """Errors of all gradients against fp32; 16 bits round the sums of slices as those of sequences."""
    for style in ("gpt", "llama"):
        case = sliced(pp=1, extra=1, num_slices=8, seq_length=61, style=style, dtype=torch.bfloat16)
        of_slices, of_megatron = run_on_ranks(1, compare_with_fp32, case)[0]
        assert 1e-3 < of_slices <= 1.2 * of_megatron, style


def test_slices_take_equal_times_and_not_equal_tokens():
    ends = slice_ends(sliced_plan(sliced(pp=2, num_slices=3, seq_length=37)))
    first, second, third = (b - a for a, b in zip((0, *ends), ends, strict=False))
    assert first > second > third
    assert ends[-1] == 37


@pytest.mark.parametrize(
    "case",
    [
        sliced(pp=2, num_slices=3, seq_length=37, style="llama"),
        slow(sliced(pp=2, dp=2, num_slices=3, distributed_optimizer=True, overlap=True)),
    ],
    ids=str,
)
def test_training_steps_and_an_evaluation_give_the_same_losses(case):
    result = run_on_ranks(case.world_size, compare_training, case, 4)[0]
    reference, planned = result["reference"], result["planned"]
    for (expected_losses, expected_norm), (losses, norm) in zip(reference[0], planned[0], strict=True):
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-5)
    assert planned[1] == pytest.approx(reference[1], rel=1e-5)
    assert abs(planned[0][-1][0][0] - planned[0][0][0][0]) > 1e-3


def without_gradients_of_context(cases: list[Case]):
    """What one iteration gives where those that come back from later slices are dropped."""
    take = ContextStore.take

    def forget(self, layer, piece):
        kept = take(self, layer, piece)
        kept.grad_key.zero_()
        return kept

    ContextStore.take = forget
    return compare_one_iteration(cases)


def test_the_comparison_notices_a_wrong_label_and_missing_gradients():
    case = sliced(pp=2, num_slices=3, seq_length=37)
    wrong_label = run_on_ranks(2, compare_one_iteration, [case], True)[0][0]
    assert wrong_label["losses"] != wrong_label["reference_losses"]
    assert max(wrong_label["errors"].values()) > 1e-3
    missing = run_on_ranks(2, without_gradients_of_context, [case])[0][0]
    assert missing["losses"] == pytest.approx(missing["reference_losses"], rel=1e-5)
    assert max(missing["errors"].values()) > 1e-3
