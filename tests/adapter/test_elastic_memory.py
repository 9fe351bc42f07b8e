"""The bytes that an elastic iteration holds after every operation, against its plan's."""

from dataclasses import replace

import pytest
from elastic_memory import costs_of, expect, header_bytes, measure, measure_cases
from elastic_models import elastic, recipe_of
from pretend import pretend_rank
from ranks import run_on_ranks

from helixpipe.elastic import costs_of_recipe
from helixpipe.elastic.chunk_schedule import elastic_plan
from helixpipe.plan.simulate import simulate


def check(case, by_stage):
    """To the byte after every operation; while one runs, never more than the simulator's peak."""
    num_layers = case.case.num_layers
    recipe = recipe_of(case)
    simulated = simulate(
        elastic_plan(recipe, num_layers), costs_of_recipe(recipe, num_layers, costs_of(case))
    )
    for stage, measured in enumerate(by_stage):
        expected = expect(case, stage, measured.moments)
        for moment, bound in zip(measured.moments, expected, strict=True):
            assert moment.held == bound.held, (str(case), stage, str(moment.operation))
            assert moment.held <= bound.planned
        assert measured.moments[-1].held == 0
        assert max(moment.held for moment in measured.moments) <= measured.peak
        headers = header_bytes(stage) * len(recipe.chunks)
        assert measured.peak <= simulated.peak_bytes[stage] + headers


def one_rank_cases():
    for style in ("gpt", "llama"):
        for checkpointed in (0, 4, None):
            yield elastic(1, style=style, checkpointed=checkpointed)
    yield elastic(1, num_slices=8, checkpointed=None, pipelines=2)
    yield elastic(1, num_slices=1, checkpointed=None)


@pytest.mark.parametrize("case", one_rank_cases(), ids=str)
def test_a_rank_holds_what_the_plan_says(case):
    with pretend_rank(case.case):
        measured = measure(case)
    check(case, [measured])
    # The planner's rows are met exactly wherever all slices in flight have gradients to gather.
    bounds = expect(case, 0, measured.moments)
    assert any(bound.held == bound.planned > 0 for bound in bounds)


@pytest.mark.parametrize("pp", [2, 4])
def test_stages_hold_what_the_plan_says(pp):
    cases = [elastic(pp, style=style, checkpointed=None) for style in ("gpt", "llama")]
    cases.append(elastic(pp, num_slices=2, checkpointed=4 // pp))
    by_rank = run_on_ranks(pp, measure_cases, cases)
    for case, by_stage in zip(cases, zip(*by_rank, strict=True), strict=True):
        check(case, by_stage)


def test_one_layer_more_is_noticed():
    case = elastic(1, checkpointed=2)
    with pretend_rank(case.case):
        measured = measure(case)
    with pytest.raises(AssertionError):
        check(replace(case, checkpointed=3), [measured])
