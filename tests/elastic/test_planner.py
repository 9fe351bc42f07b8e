"""Whole plans: what they gain over others, and that they never lose or exceed the memory."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.elastic import ElasticJob, ElasticPlan, ideal_costs, plan_batch, predict_baselines
from helixpipe.elastic.baselines import even_slices, fixed_size_chunks, packed_to_longest
from helixpipe.elastic.elastic_plan import predict
from helixpipe.elastic.sample import short_tailed_lengths, skewed_lengths
from helixpipe.plan import validate

COSTS = ideal_costs()
P, L = 4, 32
# What a stage keeps of the longest sequence with nothing checkpointed.
LONGEST_BYTES = 80000 * 17 * L // P
SKEWED = skewed_lengths()


def job(limit_bytes=2**50, **changes):
    sizes = {"num_stages": P, "num_layers": L, "memory_limit_bytes": int(limit_bytes)}
    return ElasticJob(**{"costs": COSTS, **sizes, **changes})


def test_the_skewed_batch_is_what_it_says():
    assert len(SKEWED) == 256
    assert SKEWED[128] == pytest.approx(3000, rel=0.02)
    assert sum(length > 26000 for length in SKEWED) == 3
    assert max(SKEWED) == 80000
    assert max(short_tailed_lengths()) == 8192


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
def test_gains_where_memory_is_short(share):
    """Of the longest sequence's activation: others recompute a fixed part of everything."""
    the_job = job(share * LONGEST_BYTES)
    plan = plan_batch(SKEWED, the_job)
    own = plan.prediction
    packed, fixed = packed_to_longest(SKEWED, the_job), fixed_size_chunks(SKEWED, the_job)
    assert packed.prediction.time_ms >= 1.35 * own.time_ms
    assert fixed.prediction.time_ms >= 1.15 * own.time_ms
    assert own.bubble < 0.07
    assert max(own.peak_bytes) <= the_job.memory_limit_bytes


def test_gains_where_memory_is_no_limit():
    """What balance alone gives: fixed-size chunks are at the best of all sizes here."""
    own = plan_batch(SKEWED, job()).prediction
    packed, fixed, even = predict_baselines(SKEWED, job())
    assert packed.prediction.time_ms >= 1.35 * own.time_ms
    assert fixed.prediction.time_ms >= 1.05 * own.time_ms
    assert even.prediction.time_ms >= 1.15 * own.time_ms
    assert own.bubble < 0.02
    assert own.recompute == 0


@pytest.mark.parametrize("limit_bytes", [2**50, LONGEST_BYTES / 4])
def test_never_slower_than_pure_packing(limit_bytes):
    lengths = short_tailed_lengths()
    own = plan_batch(lengths, job(limit_bytes)).prediction
    unsliced = plan_batch(lengths, job(limit_bytes), slice_counts=[1]).prediction
    assert own.time_ms <= unsliced.time_ms
    assert own.time_ms <= packed_to_longest(lengths, job(limit_bytes)).prediction.time_ms


@given(
    st.lists(st.one_of(st.integers(1, 300), st.integers(1, 8000)), min_size=1, max_size=30),
    st.sampled_from([1, 2, 4]),
    st.floats(0.15, 3.0),
)
@settings(max_examples=25, deadline=None)
def test_plans_hold_their_promises(lengths, num_stages, share):
    num_layers = 4 * num_stages
    limit = int(share * max(lengths) * 17 * 4)
    the_job = job(limit, num_stages=num_stages, num_layers=num_layers)
    try:
        plan = plan_batch(lengths, the_job)
    except ValueError as caught:
        reason = str(caught)
    else:
        reason = ""
    if reason:
        assert re.search("short of memory|does not fit into chunks|cannot hold one token", reason)
        return
    validate(plan.plan)
    plan.recipe.check(lengths)
    assert plan.plan.slices == plan.recipe.slices
    assert max(plan.prediction.peak_bytes) <= limit
    assert predict(plan.recipe, plan.plan, the_job) == plan.prediction
    assert ElasticPlan.from_json(plan.to_json()) == plan


def test_plans_are_the_same_each_time():
    the_job = job(0.6 * LONGEST_BYTES)
    first, second = (plan_batch(SKEWED, the_job, slice_counts=[4, 8]) for _ in range(2))
    assert first.recipe == second.recipe
    assert first.fingerprint == second.fingerprint


def test_capacity_bounds_chunks():
    plan = plan_batch(SKEWED, job(token_capacity=12000))
    assert max(chunk.tokens for chunk in plan.recipe.chunks) <= 12000
    with pytest.raises(ValueError, match=r"no plan fits; with .* at most 100 tokens; use more slices"):
        plan_batch(SKEWED, job(token_capacity=100))


def test_baselines_that_do_not_fit_say_so():
    tight = job(0.15 * LONGEST_BYTES)
    packed = packed_to_longest(SKEWED, tight)
    assert packed.prediction is None
    assert packed.reason.startswith("stage 0 is ")
    nothing = job(2000)
    assert "short of memory" in fixed_size_chunks(SKEWED, nothing).reason
    assert even_slices(SKEWED, nothing).reason.startswith("no plan fits")


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([], "at least one sequence"),
        ("12", "list of whole numbers"),
        ([3, 0], "length 1 must be a whole number of tokens above 0"),
        ([2.5], "length 0 must be a whole number"),
        ([True], "length 0 must be a whole number"),
    ],
)
def test_wrong_lengths(lengths, words):
    with pytest.raises(ValueError, match=words):
        plan_batch(lengths, job())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 30}, r"number of layers \(30\) must be a multiple"),
        ({"num_stages": 0}, "pipeline-parallel size must be at least 1"),
        ({"token_capacity": 0}, "token capacity must be at least 1"),
        ({"gap": -1.0}, "gap that is not negative"),
        ({"limit_bytes": 0}, "memory limit in bytes must be at least 1"),
    ],
)
def test_wrong_jobs(changes, words):
    with pytest.raises(ValueError, match=words):
        job(**changes)


def test_no_room_for_a_token():
    with pytest.raises(ValueError, match="stage 0 cannot hold one token: weights"):
        plan_batch([10], job(20))
    with pytest.raises(ValueError, match="none below 1"):
        plan_batch([10], job(), slice_counts=[0])
