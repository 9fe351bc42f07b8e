"""Sliced helix against Megatron's own schedule function on whole sequences.

Slices change the order of sums alone: measured errors of gradients are about 1e-6 in fp32 and below 1e-14
in fp64.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from equivalence_worker import compare_one_iteration, compare_training, compare_with_fp32
from models import Case, build_planned, initialize, planned_schedule, run_iteration
from ranks import run_on_ranks
from test_gradients import check, layout_name, slow
from test_sliced_gradients import LOSS_TOLERANCE, TOLERANCE

from helixpipe.megatron_adapter.segments.contexts import SliceContexts


def sliced(**values) -> Case:
    """One sequence; an odd number of tokens, and layers that ranks cannot share evenly."""
    values = {"seq_length": 37, "num_layers": 4, "tied": values.get("pp") != 3, "extra": 1, **values}
    return Case(schedule="sliced-helix", rounds=0, **values)


def cases_of(layout: Case) -> list[Case]:
    """Folds, styles, heads and ways to save memory, one or two at a time."""
    base = replace(layout, seq_length=38 if layout.tp > 1 else 37)
    llama = replace(base, style="llama", dtype=torch.float64)
    cases = [
        replace(base, fold=1),
        replace(llama, fold=2, head_placement="spread"),
        replace(base, fold=3, extra=3, without_attention=True, loss_chunk=3, mlp_chunk=4),
        replace(llama, fold=2, resend_context=True, levels="products", micro_batch_size=2),
        replace(base, fold=2, head_placement="spread", per_token_loss=True, overlap=True),
        replace(base, fold=2, extra=2, attention_range="qkv", levels="products:2,without-attention:2"),
        replace(llama, fold=2, attention_range="block", head_placement="spread", without_attention=True),
        replace(base, fold=1, attention_range="block", resend_context=True, style="llama", overlap=True),
    ]
    if layout.tp > 1:
        cases += [
            replace(case, sequence_parallel=True, seq_length=2 * layout.pp * case.fold * layout.tp + 2)
            for case in (*cases[:3], *cases[-2:])
        ]
    return cases


def further_cases_of(layout: Case) -> list[Case]:
    """All folds and ranges with one and three sequences; both kinds of positions, heads that share keys."""
    base = replace(layout, seq_length=46 if layout.tp > 1 else 47)
    return [
        replace(
            base,
            fold=fold,
            attention_range=attention_range,
            extra=extra,
            style=style,
            dtype=torch.float64,
            head_placement=head,
            groups=groups,
        )
        for fold in (1, 2, 3)
        for attention_range in ("core", "qkv", "block")
        for extra, style, head, groups in (
            (1, "gpt", "spread", None),
            (3, "gpt", "first", 2),
            (1, "llama", "first", 4),
            (3, "llama", "spread", 2),
        )
    ]


LAYOUTS = [
    slow(sliced(pp=1)),
    slow(sliced(pp=2)),
    sliced(pp=3),
    slow(sliced(pp=4)),
    slow(sliced(pp=2, tp=2)),
    slow(sliced(pp=3, tp=2)),
    slow(sliced(pp=2, dp=2)),
    slow(sliced(pp=3, dp=2)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_losses_and_gradients_equal_megatrons(layout):
    check(cases_of(layout), TOLERANCE, LOSS_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [sliced(pp=p) for p in (2, 3, 4)], ids=layout_name)
def test_all_folds_and_ranges_equal_megatrons(layout):
    check(further_cases_of(layout), TOLERANCE, LOSS_TOLERANCE)


@pytest.mark.slow
def test_in_bf16_slices_are_as_near_to_the_truth_as_megatron():
    case = sliced(pp=4, fold=2, seq_length=61, style="llama", tied=False, dtype=torch.bfloat16)
    of_slices, of_megatron = run_on_ranks(4, compare_with_fp32, case)[0]
    assert 1e-3 < of_slices <= 1.2 * of_megatron


@pytest.mark.parametrize(
    "case",
    [
        sliced(pp=3, fold=1, num_layers=3, style="llama", head_placement="spread"),
        slow(sliced(pp=2, dp=2, fold=2, distributed_optimizer=True, overlap=True, without_attention=True)),
    ],
    ids=str,
)
def test_training_steps_and_an_evaluation_give_the_same_losses(case):
    result = run_on_ranks(case.world_size, compare_training, case, 3)[0]
    reference, planned = result["reference"], result["planned"]
    for (expected_losses, expected_norm), (losses, norm) in zip(reference[0], planned[0], strict=True):
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-5)
    assert planned[1] == pytest.approx(reference[1], rel=1e-5)
    assert abs(planned[0][-1][0][0] - planned[0][0][0][0]) > 1e-3


def without_returned_gradients(cases: list[Case]):
    """What one iteration gives where those that come home in messages are dropped."""
    with mock.patch.object(SliceContexts, "take_back"):
        return compare_one_iteration(cases)


def test_the_comparison_notices_a_wrong_label_and_gradients_that_do_not_come_home():
    case = sliced(pp=3, fold=1)
    wrong_label = run_on_ranks(3, compare_one_iteration, [case], True)[0][0]
    assert wrong_label["losses"] != wrong_label["reference_losses"]
    assert max(wrong_label["errors"].values()) > 1e-3
    missing = run_on_ranks(3, without_returned_gradients, [case])[0][0]
    assert missing["losses"] == pytest.approx(missing["reference_losses"], rel=1e-5)
    assert max(missing["errors"].values()) > 1e-3


def run_with_loss(case: Case, change):
    """An iteration whose loss function is changed; its losses, or the error."""
    initialize(case)
    chunks = build_planned(case)

    def changed(case):
        step = original(case)

        def forward_step(data_iterator, model):
            output, loss_func = step(data_iterator, model)
            return output, lambda losses: loss_func(change(losses))

        return forward_step

    original = run_iteration.__globals__["make_forward_step"]
    with mock.patch.dict(run_iteration.__globals__, {"make_forward_step": changed}):
        try:
            losses = run_iteration(case, chunks, planned_schedule(case))
        except ValueError as error:
            return str(error)
    gradients = [parameter.main_grad for parameter in chunks[0].module.parameters()]
    return losses, all(bool(gradient.isfinite().all()) for gradient in gradients)


def squared(losses):
    return losses**2


def halved(losses):
    return losses / 2


def test_only_weighted_sums_of_losses_are_taken():
    case = sliced(pp=1, fold=2)
    (error,) = run_on_ranks(1, run_with_loss, case, squared)
    assert "not a weighted sum of the tokens' losses" in error
    ((losses, is_finite),) = run_on_ranks(1, run_with_loss, case, halved)
    assert len(losses) == 1
    assert is_finite
