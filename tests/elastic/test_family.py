"""Elastic 1F1B or elastic helix for a whole job, and the stages of the one and the cut of the other."""

from dataclasses import replace
from functools import partial

import pytest

from helixpipe.elastic import ElasticJob, ideal_costs, plan_batch
from helixpipe.elastic.search.choice import SCHEDULES
from helixpipe.elastic.search.family import choose_family
from helixpipe.elastic.search.planner import estimate_batch
from helixpipe.elastic.search.round_planner import plan_rounds
from helixpipe.elastic.search.stage_balance import balanced_stage_layers

COSTS = ideal_costs(balanced_length=4000.0)
ONE_LONG = (24000, 3000, 3000, 2000)
MANY = (1500, 1400, 1000, 900, 800, 700, 600, 500) * 2
# As long as three layers.
HEAD = replace(
    COSTS,
    forward=replace(COSTS.forward, head_ms=3 * COSTS.forward.token_ms),
    backward=replace(COSTS.backward, head_ms=3 * COSTS.backward.token_ms),
)
PIPELINES, ROUNDS = SCHEDULES


def job(limit_bytes=2**50, **changes):
    sizes = {"num_stages": 4, "num_layers": 16, "memory_limit_bytes": int(limit_bytes)}
    return ElasticJob(**{"costs": COSTS, **sizes, **changes})


def test_the_family_is_the_faster_one_over_all_batches():
    found = choose_family([ONE_LONG, ONE_LONG[:2]], job())
    assert (found.job.schedule, found.job.stage_layers) == (ROUNDS, ())
    assert (found.job.attention_range, found.job.recompute) == ("core", "none")
    total = sum(plan_rounds(batch, job()).prediction.time_ms for batch in (ONE_LONG, ONE_LONG[:2]))
    assert found.reason.startswith(
        f"chose {ROUNDS} (range core, recompute none): predicted {total / 1e3:.4g} s for the first 2 batches"
    )
    assert f"; {PIPELINES} " in found.reason
    slow = replace(COSTS, cut=replace(COSTS.cut, operation_ms=50.0))
    other = choose_family([ONE_LONG], job(costs=slow))
    assert (other.job.schedule, other.job.attention_range, other.job.recompute) == (PIPELINES, None, None)
    assert f"for the first batch; {ROUNDS} (range core, recompute none) " in other.reason


def test_1f1b_gets_the_stages_that_balance_its_head():
    found = choose_family([MANY], job(costs=HEAD), [PIPELINES])
    assert found.job.stage_layers == (4, 5, 5, 2)
    assert found.reason.startswith(f"chose {PIPELINES} (stages of 4, 5, 5, 2 layers): predicted ")
    even, uneven = (
        plan_batch(MANY, job(costs=HEAD, stage_layers=own), slice_counts=(1, 2)) for own in ((), (4, 5, 5, 2))
    )
    assert uneven.prediction.time_ms < 0.85 * even.prediction.time_ms
    assert uneven.plan.parameters["stage_layers"] == "4,5,5,2"
    assert choose_family([MANY], job(), [PIPELINES]).job.stage_layers == ()


def test_an_estimate_is_what_a_plan_takes_where_nothing_is_recomputed():
    for own in ((), (4, 5, 5, 2)):
        planned = plan_batch(ONE_LONG, job(costs=HEAD, stage_layers=own))
        assert estimate_batch(ONE_LONG, job(costs=HEAD, stage_layers=own)) == pytest.approx(
            planned.prediction.time_ms, rel=1e-9
        )


def test_as_little_is_recomputed_as_fits_all_batches():
    """The batch that takes longest fits in more rounds; the other has one document, which is a round."""
    products = replace(
        COSTS.cut.levels[0],
        recompute="products",
        before_again=0.2,
        after_again=0.7,
        before_bytes=0.5,
        attention_bytes=2.0,
        after_bytes=1.0,
    )
    costs = replace(COSTS, cut=replace(COSTS.cut, levels=(*COSTS.cut.levels, products)))
    small = partial(job, costs=costs, num_stages=2, num_layers=2)
    batches = (800,) * 20, (3000,)
    alone = plan_rounds(batches[1], small(recompute="none"))
    enough = max(alone.prediction.peak_with_messages)
    for limit, level in ((enough, "none"), (enough - 1, "products")):
        assert plan_rounds(batches[0], small(limit)).recipe.recompute == "none"
        assert choose_family(batches, small(limit), [ROUNDS]).job.recompute == level


def test_what_does_not_fit_is_out_and_the_line_says_why():
    found = choose_family([ONE_LONG], job(costs=replace(COSTS, cut=None)))
    assert found.job.schedule == PIPELINES
    assert f"no plan for {ROUNDS}: the costs do not say how a layer's fall" in found.reason
    assert "\n" not in found.reason
    with pytest.raises(ValueError, match=rf"^{PIPELINES}: .*; {ROUNDS}: no elastic helix fits") as caught:
        choose_family([ONE_LONG], job(limit_bytes=2e4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "stages", "head", "found"),
    [
        (16, 4, 0.0, ()),
        (16, 4, 3.0, (4, 5, 5, 2)),
        (16, 4, 0.5, ()),  # a layer elsewhere would take longer than the head
        (8, 2, 3.0, (5, 3)),
        (8, 2, 20.0, (7, 1)),
        (8, 1, 3.0, ()),
        (32, 8, 3.0, (1, 5, 5, 5, 5, 5, 5, 1)),
        (32, 8, 0.9, ()),
    ],
)
def test_the_slowest_stage_takes_the_shortest(layers, stages, head, found):
    """A head as long as so many layers, of short sequences."""
    costs = replace(
        COSTS,
        forward=replace(COSTS.forward, attention_ms=0.0, head_ms=head * COSTS.forward.token_ms),
        backward=replace(COSTS.backward, attention_ms=0.0, head_ms=head * COSTS.backward.token_ms),
    )
    assert balanced_stage_layers((100, 7), costs, layers, stages) == found


def test_long_sequences_outweigh_a_head():
    assert balanced_stage_layers((100,), HEAD, 16, 4) == (4, 5, 5, 2)
    assert balanced_stage_layers((400000,), HEAD, 16, 4) == ()
