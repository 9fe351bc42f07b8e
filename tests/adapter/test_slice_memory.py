"""The bytes that a schedule of slices holds after every operation, against its plan's."""

from __future__ import annotations

from dataclasses import replace

import pytest
from elastic_memory import expect_of_slices, measure_cases_of_slices, measure_slices
from models import Case
from pretend import pretend_rank
from ranks import run_on_ranks

SLICED = Case(pp=1, schedule="seq1f1b", fold=1, extra=1, num_slices=3, seq_length=37, per_token_loss=True)


def check(case, by_stage):
    """To the byte after every operation."""
    for stage, measured in enumerate(by_stage):
        expected = expect_of_slices(case, stage, measured.moments)
        for moment, wanted in zip(measured.moments, expected, strict=True):
            assert moment.held == wanted, (str(case), stage, str(moment.operation))
        assert measured.moments[-1].held == 0


@pytest.mark.parametrize("style", ["gpt", "llama"])
@pytest.mark.parametrize("recompute", [None, "full"])
def test_a_rank_holds_what_the_plan_says(style, recompute):
    case = replace(SLICED, style=style, recompute=recompute)
    with pretend_rank(case):
        measured = measure_slices(case)
    check(case, [measured])


def test_stages_hold_what_the_plan_says():
    cases = [replace(SLICED, pp=2, style="llama", num_slices=count) for count in (1, 4)]
    by_rank = run_on_ranks(2, measure_cases_of_slices, cases)
    for case, by_stage in zip(cases, zip(*by_rank, strict=True), strict=True):
        check(case, by_stage)


def test_one_slice_more_is_noticed():
    with pretend_rank(SLICED):
        measured = measure_slices(SLICED)
    with pytest.raises(AssertionError):
        check(replace(SLICED, num_slices=4), [measured])
