"""Plans against Megatron's own schedule functions: same weights, same batch, every loss and gradient.

Megatron's 1F1B (or no pipelining for p=1) runs the stock GPTModel with the same core attention. Measured
errors of helix are about 1e-7 in fp32 and 2e-16 in fp64: only the order in which micro batches are summed
differs. Schedules of stages, with or without W, keep that order: they give Megatron's bits, but for a weight
that serves both as embedding and as head of one stage, where two sums are added in another order (3e-8).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from equivalence_worker import compare_one_iteration, compare_training
from models import Case
from ranks import run_on_ranks

from helixpipe.plan.schedules import SCHEDULES

ON_GPU = torch.cuda.is_available()
# Each gradient tensor: norm of the difference over its norm. Attention on GPUs adds in any order.
TOLERANCE = {torch.float32: 1e-5 if ON_GPU else 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}
BITWISE = dict.fromkeys(TOLERANCE, 0.0)
# Where memory is saved, a loss of fewer tokens at a time may be rounded otherwise. In 16 bits the operators
# round the activation function once, Megatron after each of its steps: then the two differ by as much as they
# do from the truth, to which tests/layers/test_memory_saving.py holds both.
SAVING_TOLERANCE = {**TOLERANCE, torch.bfloat16: 5e-2}
SAVING_LOSS_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 5e-3}

LAYOUTS = [
    Case(pp=1),
    Case(pp=2),
    Case(pp=4),
    Case(pp=2, tp=2),
    Case(pp=2, dp=2),
]
LARGE_LAYOUTS = [Case(pp=4, tp=2), Case(pp=4, dp=2), Case(pp=2, tp=2, dp=2), Case(pp=4, tp=2, dp=2)]


def slow(case: Case) -> Any:
    return pytest.param(case, marks=pytest.mark.slow)


def layout_name(case: Case) -> str:
    return f"pp{case.pp}-tp{case.tp}-dp{case.dp}"


def core_cases_of(layout: Case) -> list[Case]:
    """Both styles; then one option at a time."""
    cases = [
        replace(layout, style=style, **change)
        for change in ({}, {"dtype": torch.float64}, {"overlap": True})
        for style in ("gpt", "llama")
    ]
    cases.append(replace(layout, per_token_loss=True))
    if layout.tp > 1:
        cases += [replace(layout, style=style, sequence_parallel=True) for style in ("gpt", "llama")]
    return cases


def further_cases_of(layout: Case) -> list[Case]:
    """Folds, rounds, sizes and bf16."""
    cases = [
        replace(layout, style=style, fold=fold, rounds=rounds)
        for style in ("gpt", "llama")
        for fold, rounds in ((1, 1), (1, 2), (2, 2))
    ]
    return [
        *cases,
        replace(layout, dtype=torch.bfloat16),
        replace(layout, style="llama", micro_batch_size=2),
        replace(layout, style="llama", num_layers=8, seq_length=127 + layout.tp % 2, groups=layout.tp),
    ]


def lending_cases_of(layout: Case) -> list[Case]:
    """Attention, and the head, with weights that other ranks own; one option at a time on few ranks."""
    if layout.pp == 1:
        return [replace(layout, attention_range="block", head_placement="spread")]
    qkv, block = (replace(layout, attention_range=name) for name in ("qkv", "block"))
    spread = replace(layout, head_placement="spread")
    cases = [
        replace(qkv, rounds=2),
        replace(qkv, dtype=torch.float64, per_token_loss=True, head_placement="spread"),
        replace(block, rounds=2),
        replace(block, dtype=torch.float64, style="llama"),
        replace(block, style="llama", fold=1, overlap=True, head_placement="spread"),
        replace(spread, rounds=2),
    ]
    if layout.tp > 1:
        cases.append(replace(qkv, style="llama", sequence_parallel=True))
        cases.append(replace(qkv, dtype=torch.float64, sequence_parallel=True, head_placement="spread"))
        cases.append(replace(block, sequence_parallel=True, head_placement="spread"))
    if layout.world_size <= 4:
        cases += [
            replace(qkv, overlap=True, tied=False),
            replace(block, overlap=True, style="llama", num_layers=8),
            replace(block, dtype=torch.bfloat16, head_placement="spread"),
            replace(block, per_token_loss=True, micro_batch_size=2, seq_length=127 + layout.tp % 2),
        ]
    return cases


def splitting_cases_of(layout: Case) -> list[Case]:
    """Helix with weight gradients apart, in all rounds or in the last one only."""
    every, last = replace(layout, split="all"), replace(layout, split="last", rounds=2)
    cases = [
        every,
        replace(every, style="llama", dtype=torch.float64, fold=1, rounds=3, tied=True),
        replace(every, style="llama", overlap=True, per_token_loss=True),
        replace(last, overlap=True),
        replace(last, dtype=torch.float64, without_attention=True, style="llama"),
        replace(last, without_attention=True, mlp_chunk=7, loss_chunk=10, num_layers=2 * layout.pp),
        replace(every, attention_range="qkv", dtype=torch.float64, head_placement="spread"),
        replace(last, attention_range="qkv", style="llama", without_attention=True, overlap=True),
        replace(every, attention_range="block", rounds=2, overlap=True, head_placement="spread"),
        replace(
            last, attention_range="block", style="llama", head_placement="spread", without_attention=True
        ),
    ]
    if layout.tp > 1:
        cases += [
            replace(case, sequence_parallel=True)
            for case in (every, replace(last, attention_range="block", head_placement="spread"))
        ]
    return cases


def interlocked_cases_of(layout: Case) -> list[Case]:
    """Rounds among each other, weight gradients and products kept, layers and micro batches of any number."""
    layout = replace(layout, num_layers=6 if layout.pp == 3 else 4)
    base = replace(layout, interlocked=True, rounds=2, fold=1)
    block = replace(base, attention_range="block", head_placement="spread")
    cases = [
        base,
        replace(base, fold=2, style="llama", dtype=torch.float64, levels="products"),
        replace(base, split="planned", rounds=3, overlap=True, per_token_loss=True),
        replace(base, attention_range="qkv", split="planned", style="llama", extra=1),
        replace(
            base,
            num_layers=layout.num_layers + 1,
            head_placement="spread",
            dtype=torch.float64,
            style="llama",
        ),
        replace(block, split="planned", levels="products", dtype=torch.float64, style="llama"),
        replace(
            block, split="planned", levels="products:2,none:1,without-attention:1", num_layers=4, tied=False
        ),
        replace(block, fold=2, extra=layout.pp, without_attention=True, loss_chunk=10, overlap=True),
        replace(layout, extra=1, num_layers=layout.num_layers + 1, style="llama"),
        replace(layout, rounds=0, extra=layout.pp, attention_range="block", levels="products", mlp_chunk=7),
    ]
    if layout.tp > 1:
        cases += [replace(case, sequence_parallel=True) for case in (cases[2], cases[5], cases[7])]
    return cases


def stage_cases_of(layout: Case) -> list[Case]:
    """Schedules of stages: zero bubble with one option at a time, the others briefly."""
    zb = replace(layout, schedule="zb-h1")
    cases = [replace(zb, style=style, tied=tied) for style in ("gpt", "llama") for tied in (True, False)]
    cases += [
        replace(zb, dtype=torch.float64),
        replace(zb, dtype=torch.bfloat16, style="llama"),
        replace(zb, overlap=True),
        replace(zb, overlap=True, style="llama", rounds=2),
        replace(zb, per_token_loss=True),
        replace(zb, recompute="selective"),
        replace(zb, recompute="full", style="llama", micro_batch_size=2),
        replace(layout, schedule="gpipe"),
        replace(layout, schedule="gpipe", style="llama", overlap=True),
    ]
    v_shaped = [name for name, entry in SCHEDULES.items() if entry.needs_untied_weights]
    for number, schedule in enumerate(v_shaped):
        v = replace(layout, schedule=schedule, num_layers=8, tied=False, overlap=number % 2 == 0)
        cases += [v, replace(v, style="llama", dtype=torch.float64)]
    if layout.tp > 1:
        cases += [
            replace(zb, style=style, sequence_parallel=True, recompute=recompute)
            for style, recompute in (("gpt", None), ("llama", "full"))
        ]
        cases.append(replace(cases[-3], sequence_parallel=True))
    return cases


def saving_cases_of(layout: Case) -> list[Case]:
    """Everything that saves memory, at once, under helix and under stages with and without W."""
    helix = replace(layout, without_attention=True, mlp_chunk=7, loss_chunk=10, num_layers=2 * layout.pp)
    cases = [
        helix,
        replace(
            helix, style="llama", dtype=torch.float64, seq_length=127 + layout.tp % 2, micro_batch_size=2
        ),
        replace(helix, tied=False, overlap=True, rounds=2),
        replace(helix, style="llama", overlap=True, tied=True),
        replace(helix, style="llama", dtype=torch.bfloat16),
        replace(helix, schedule="zb-h1", overlap=True),
        replace(helix, schedule="zb-v", style="llama", tied=False),
        replace(helix, schedule="gpipe", dtype=torch.float64),
        replace(layout, without_attention=True, schedule="zb-h1", style="llama"),
        replace(layout, levels="products", schedule="zb-h1"),
        replace(layout, levels="products:1,none:3", schedule="gpipe", style="llama", dtype=torch.float64),
        replace(helix, without_attention=False, levels="products", style="llama", overlap=True),
        replace(helix, without_attention=False, levels="products", mlp_chunk=None, dtype=torch.float64),
    ]
    if layout.pp > 1:
        # With borrowed weights, which the backward pass computes with again.
        cases += [
            replace(helix, attention_range="qkv", head_placement="spread"),
            replace(helix, attention_range="qkv", dtype=torch.float64, style="llama", overlap=True),
            replace(helix, attention_range="block", overlap=True),
            replace(
                helix,
                attention_range="block",
                head_placement="spread",
                style="llama",
                dtype=torch.float64,
                rounds=2,
            ),
        ]
    if layout.tp > 1:
        chosen = (*cases[:2], cases[5], replace(helix, attention_range="qkv", style="llama"))
        cases += [replace(case, sequence_parallel=True, seq_length=126) for case in chosen]
    return cases


@pytest.mark.parametrize("layout", [*LAYOUTS, *map(slow, LARGE_LAYOUTS)], ids=layout_name)
def test_losses_and_gradients_equal_megatrons(layout):
    check(core_cases_of(layout) + lending_cases_of(layout), TOLERANCE)


@pytest.mark.parametrize(
    "layout",
    [
        *(layout if layout.world_size <= 2 else slow(layout) for layout in LAYOUTS),
        *map(slow, LARGE_LAYOUTS),
    ],
    ids=layout_name,
)
def test_folds_rounds_and_sizes_equal_megatrons(layout):
    check(further_cases_of(layout), TOLERANCE)


@pytest.mark.parametrize(
    "layout",
    [Case(pp=2), *map(slow, (Case(pp=3, num_layers=6), Case(pp=4), Case(pp=2, tp=2), Case(pp=2, dp=2)))],
    ids=layout_name,
)
def test_weight_gradients_apart_equal_megatrons(layout):
    check(splitting_cases_of(layout), SAVING_TOLERANCE, SAVING_LOSS_TOLERANCE)


@pytest.mark.parametrize(
    "layout",
    [Case(pp=2), *map(slow, (Case(pp=3), Case(pp=4), Case(pp=2, tp=2), Case(pp=2, dp=2), Case(pp=1)))],
    ids=layout_name,
)
def test_interlocked_rounds_equal_megatrons(layout):
    # More layers than elsewhere add a little more rounding: 1.2e-6 at most.
    tolerance = {**SAVING_TOLERANCE, torch.float32: 3e-6}
    check(interlocked_cases_of(layout), tolerance, SAVING_LOSS_TOLERANCE)


@pytest.mark.parametrize(
    "layout",
    [Case(pp=1), Case(pp=2), *map(slow, (Case(pp=4), Case(pp=2, dp=2), Case(pp=2, tp=2)))],
    ids=layout_name,
)
def test_stages_give_megatrons_bits(layout):
    cases = stage_cases_of(layout)
    twice_used = [case for case in cases if case.pp == 1 and case.is_tied]
    check(twice_used, TOLERANCE)
    check([case for case in cases if case not in twice_used], TOLERANCE if ON_GPU else BITWISE)


@pytest.mark.parametrize(
    "layout", [Case(pp=1), Case(pp=2), slow(Case(pp=2, dp=2)), slow(Case(pp=2, tp=2))], ids=layout_name
)
def test_saving_memory_keeps_losses_and_gradients(layout):
    check(saving_cases_of(layout), SAVING_TOLERANCE, SAVING_LOSS_TOLERANCE)


def check(
    cases: list[Case],
    tolerance: dict[torch.dtype, float],
    loss_tolerance: dict[torch.dtype, float] = BITWISE,
) -> None:
    # No attention kernel for GPUs takes float64.
    cases = [case for case in cases if not (ON_GPU and case.dtype is torch.float64)]
    if cases:
        of_ranks = run_on_ranks(cases[0].world_size, compare_one_iteration, cases)
        check_results(cases, of_ranks, tolerance, loss_tolerance)


def check_results(
    cases: list[Case],
    of_ranks: list[list[dict[str, Any]]],
    tolerance: dict[torch.dtype, float],
    loss_tolerance: dict[torch.dtype, float] = BITWISE,
) -> None:
    for of_rank in of_ranks:
        for case, result in zip(cases, of_rank, strict=True):
            losses, expected = (
                torch.tensor(result[key], dtype=torch.float64) for key in ("losses", "reference_losses")
            )
            assert losses.shape == expected.shape, case
            allowed = loss_tolerance[case.dtype] * expected.abs()
            assert bool(((losses - expected).abs() <= allowed).all()), case
            assert not result["missing"], case
            # A gradient of zeros would agree with anything.
            assert result["smallest_norm"] > 1e-3, case
            worst = max(result["errors"], key=result["errors"].get)
            assert result["errors"][worst] <= tolerance[case.dtype], (
                str(case),
                worst,
                result["errors"][worst],
            )
            assert result["trace_is_plan"], case
            assert bool(result["deferred"]) == case.has_weight_gradients, case


def test_the_comparison_notices_one_wrong_label():
    case = Case(pp=2)
    result = run_on_ranks(2, compare_one_iteration, [case], True)[0][0]
    assert result["losses"] != result["reference_losses"]
    assert max(result["errors"].values()) > 1e-3


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=4),
        slow(Case(pp=2, tp=2, style="llama", sequence_parallel=True)),
        slow(Case(pp=2, dp=2, style="llama", distributed_optimizer=True)),
        slow(Case(pp=2, dp=2, distributed_optimizer=True, overlap=True)),
        slow(Case(pp=2, dp=2, style="llama", distributed_optimizer=True, overlap=True, dtype=torch.bfloat16)),
        slow(Case(pp=2, tp=2, style="llama", sequence_parallel=True, attention_range="qkv")),
        slow(
            Case(
                pp=2,
                dp=2,
                distributed_optimizer=True,
                overlap=True,
                attention_range="block",
                head_placement="spread",
            )
        ),
        slow(
            Case(
                pp=2,
                dp=2,
                rounds=2,
                distributed_optimizer=True,
                overlap=True,
                attention_range="qkv",
                without_attention=True,
                mlp_chunk=7,
            )
        ),
        slow(Case(pp=2, dp=2, schedule="zb-h1", distributed_optimizer=True, overlap=True)),
        slow(Case(pp=1, dp=2, schedule="zb-h1", overlap=True)),
        slow(Case(pp=2, dp=2, schedule="zb-v", tied=False, distributed_optimizer=True, overlap=True)),
        Case(
            pp=2,
            dp=2,
            distributed_optimizer=True,
            overlap=True,
            dtype=torch.bfloat16,
            without_attention=True,
            mlp_chunk=7,
            loss_chunk=10,
        ),
    ],
    ids=str,
)
def test_ten_training_steps_and_an_evaluation_give_the_same_losses(case):
    result = run_on_ranks(case.world_size, compare_training, case, 10)[0]
    reference, planned = result["reference"], result["planned"]
    tolerance = 1e-5 if case.dtype is torch.float32 else 1e-2
    for (expected_losses, expected_norm), (losses, norm) in zip(reference[0], planned[0], strict=True):
        assert losses == pytest.approx(expected_losses, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=tolerance)
    assert planned[1] == pytest.approx(reference[1], rel=tolerance)
    # Training really happened: the first batch's loss moved.
    assert abs(planned[0][-1][0][0] - planned[0][0][0][0]) > 1e-3
