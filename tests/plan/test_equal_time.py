"""Cuts of sequences into slices of equal time."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.plan.equal_time import equal_time_ends
from helixpipe.plan.slice_ends import TokenTimes, cut_at_equal_times, ends_for, slice_ends, with_slice_ends


@given(st.integers(1, 5000), st.integers(1, 40), st.floats(1e-3, 1e3), st.floats(0, 1e3), st.integers(1, 130))
def test_every_slice_has_tokens_and_all_but_the_last_end_at_multiples(
    length, count, linear, attention, multiple
):
    if count > -(-length // multiple):
        with pytest.raises(ValueError, match=f"{length} tokens cannot be cut into {count} slices"):
            equal_time_ends(length, count, linear, attention, multiple)
        return
    ends = equal_time_ends(length, count, linear, attention, multiple)
    assert len(ends) == count
    assert ends[-1] == length
    assert all(a < b for a, b in pairwise((0, *ends)))
    assert not any(end % multiple for end in ends[:-1])


def test_a_plan_is_cut_at_whole_tiles_where_sequences_are_long_enough():
    request = ScheduleRequest(num_layers=2, num_ranks=2, num_microbatches=1, num_fold=2)
    plan = build_plan("sliced-helix", request)
    times = TokenTimes(300.0, 0.02)
    long = slice_ends(cut_at_equal_times(plan, 16 * 128 * 4, times, 1))
    assert not any(end % 128 for end in long)
    short = slice_ends(cut_at_equal_times(plan, 16 * 128 * 4 - 2, times, 2))
    assert any(end % 128 for end in short)
    assert not any(end % 2 for end in short)
    with pytest.raises(
        ValueError, match="--num-fold 2: a sequence of 3 tokens cannot be cut into 4 slices; use fewer"
    ):
        cut_at_equal_times(plan, 3, times, 1)


def test_times_are_equal_to_rounding():
    ends = equal_time_ends(100_000, 8, 300.0, 0.02)
    times = [300.0 * (b - a) + 0.02 * (b * b - a * a) for a, b in pairwise((0, *ends))]
    assert times == pytest.approx([times[0]] * 8, rel=1e-4)


def sliced(ends=None):
    plan = build_plan("seq1f1b", ScheduleRequest(num_layers=2, num_ranks=2, num_microbatches=2, num_slices=2))
    return plan if ends is None else with_slice_ends(plan, ends)


def test_a_plan_says_where_its_slices_end():
    assert slice_ends(sliced()) is None
    assert ends_for(type(sliced()).from_json(sliced((20, 32)).to_json()), 32, 4) == (20, 32)


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (None, "does not say"),
        ((20, 30), "sequences of 30 tokens, the job's have 32"),
        ((32,), "2 rising numbers"),
        ((32, 32), "2 rising numbers"),
        ((0, 32), "2 rising numbers"),
        ((-1, 32), "2 rising numbers"),
        ((21, 32), "at token 21, which 4 tensor-parallel ranks cannot share"),
    ],
)
def test_ends_that_do_not_fit_are_refused(ends, words):
    with pytest.raises(ValueError, match=words):
        ends_for(sliced(ends), 32, 4)
