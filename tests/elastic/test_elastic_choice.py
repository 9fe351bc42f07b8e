"""Elastic 1F1B or elastic helix: the faster plan that fits is taken, and one line says why."""

from dataclasses import replace

import pytest

from helixpipe.elastic import ElasticJob, ideal_costs
from helixpipe.elastic.search.choice import choose_plan
from helixpipe.elastic.search.planner import plan_batch
from helixpipe.elastic.search.round_planner import plan_rounds
from helixpipe.plan.simulation.network import Network

COSTS = ideal_costs(balanced_length=4000.0)
ONE_LONG = (24000, 3000, 3000, 2000)
COUNTS = (1, 4)


def job(limit_bytes=2**50, **changes):
    sizes = {"num_stages": 4, "num_layers": 16, "memory_limit_bytes": int(limit_bytes)}
    return ElasticJob(**{"costs": COSTS, **sizes, **changes})


def choose(lengths, the_job, schedule="auto"):
    return choose_plan(lengths, replace(the_job, schedule=schedule), slice_counts=COUNTS)


def test_the_faster_of_both_is_taken():
    choice = choose(ONE_LONG, job())
    helix = plan_rounds(ONE_LONG, job())
    pipeline = plan_batch(ONE_LONG, job(), slice_counts=COUNTS)
    assert choice.plan == helix
    assert choice.others["elastic"] == pipeline
    assert helix.prediction.time_ms < pipeline.prediction.time_ms
    assert choice.reason.startswith("elastic-helix is predicted to take")
    assert f"{pipeline.prediction.time_ms / helix.prediction.time_ms:.3f}x" in choice.reason


def test_1f1b_is_taken_where_it_is_faster():
    """Messages that take long: helix has 2L times as many as stages have."""
    slow = replace(COSTS, cut=replace(COSTS.cut, operation_ms=50.0))
    choice = choose(ONE_LONG, job(costs=slow))
    assert choice.plan.plan.schedule == "elastic"
    assert choice.reason.startswith("elastic is predicted to take")
    assert choice.others["elastic-helix"].prediction.time_ms > choice.plan.prediction.time_ms


def test_the_fastest_attention_range_is_taken():
    """Messages of a range with weights are smaller, and it has an operation more for each layer."""
    network = Network(latency_ms=0.0, gb_per_s=1e-6)
    cut = replace(COSTS.cut, into_bytes=1.0, out_bytes=1.0, attention_range="block")
    costs = replace(COSTS, network=network, cuts_with_weights=(cut,))
    few = {"round_counts": (), "folds": (2,)}
    found = [
        plan_rounds(ONE_LONG, job(costs=costs, attention_range=name), **few)
        for name in (None, "core", "block")
    ]
    times = [plan.prediction.time_ms for plan in found]
    assert (found[0], times[0]) == (found[2], min(times))
    assert times[2] < times[1]
    slow = replace(costs, network=None, cuts_with_weights=(replace(cut, operation_ms=1.0),))
    assert plan_rounds(ONE_LONG, job(costs=slow), **few).recipe.attention_range == "core"


def test_what_has_no_plan_loses_and_the_line_says_why():
    choice = choose(ONE_LONG, job(costs=replace(COSTS, cut=None)))
    assert choice.plan.plan.schedule == "elastic"
    assert choice.reason.startswith("elastic, since elastic-helix has no plan: the costs do not say")
    assert "\n" not in choice.reason


def test_nothing_fits():
    with pytest.raises(ValueError, match=r"elastic: .*; elastic-helix: no elastic helix fits") as caught:
        choose(ONE_LONG, job(limit_bytes=2e4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule", ["elastic", "elastic-helix"])
def test_one_can_be_asked_for(schedule):
    choice = choose(ONE_LONG, job(), schedule=schedule)
    assert choice.plan.plan.schedule == schedule
    assert choice.reason == f"{schedule}, as asked for."
