"""The bytes that an elastic iteration holds after every operation, against its plan's."""

from dataclasses import replace

import pytest
from elastic_memory import costs_of, expect, header_bytes, measure, measure_cases
from elastic_models import elastic, recipe_of
from pretend import pretend_rank
from ranks import run_on_ranks

from helixpipe.elastic import costs_of_recipe
from helixpipe.elastic.chunk_schedule import elastic_plan
from helixpipe.plan.simulation.memory import held_bytes
from helixpipe.plan.simulation.simulate import simulate


def check(case, by_stage):
    """To the byte after every operation; while one runs, never more than the simulator's peak."""
    num_layers = case.case.num_layers
    recipe = recipe_of(case)
    simulated = simulate(
        elastic_plan(recipe, num_layers), costs_of_recipe(recipe, num_layers, costs_of(case))
    )
    for stage, measured in enumerate(by_stage):
        expected = expect(case, stage, measured.moments)
        for moment, wanted in zip(measured.moments, expected, strict=True):
            assert moment.held == wanted, (str(case), stage, str(moment.operation))
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


@pytest.mark.parametrize("pp", [2, 4])
def test_stages_hold_what_the_plan_says(pp):
    cases = [elastic(pp, style=style, checkpointed=None) for style in ("gpt", "llama")]
    cases.append(elastic(pp, num_slices=2, checkpointed=4 // pp))
    by_rank = run_on_ranks(pp, measure_cases, cases)
    for case, by_stage in zip(cases, zip(*by_rank, strict=True), strict=True):
        check(case, by_stage)


@pytest.mark.slow
def test_padding_is_held_too():
    """Tensor-parallel ranks hold their shares of chunks whose tokens are rounded up."""
    cases = [
        elastic(1, tp=2, sequence_parallel=True, style=style, checkpointed=checkpointed)
        for style, checkpointed in (("gpt", 0), ("llama", None))
    ]
    by_rank = run_on_ranks(2, measure_cases, cases)
    for case, of_ranks in zip(cases, zip(*by_rank, strict=True), strict=True):
        assert any(chunk.tokens % 2 for chunk in recipe_of(case).chunks)
        for measured in of_ranks:
            check(case, [measured])


def test_gradients_of_slices_are_held_from_the_last_backward_on():
    """With them counted from the forward on, or not at all, the comparison fails."""
    case = elastic(1)
    with pretend_rank(case.case):
        measured = measure(case)
    recipe, costs = recipe_of(case), costs_of(case)
    plan = elastic_plan(recipe, case.case.num_layers)
    held = [moment.held for moment in measured.moments]

    def planned(of_recipe):
        changed = {name: of_recipe(cost) for name, cost in of_recipe_costs.segments.items()}
        return [level.after for level in held_bytes(plan, replace(of_recipe_costs, segments=changed), 0)]

    of_recipe_costs = costs_of_recipe(recipe, case.case.num_layers, costs)
    assert planned(lambda cost: cost) == held
    early = planned(lambda cost: replace(cost, bytes=cost.bytes + cost.gradient_bytes, gradient_bytes=0))
    assert max(early) > max(held)
    assert planned(lambda cost: replace(cost, gradient_bytes=0)) != held


def test_one_layer_more_is_noticed():
    case = elastic(1, checkpointed=2)
    with pretend_rank(case.case):
        measured = measure(case)
    with pytest.raises(AssertionError):
        check(replace(case, checkpointed=3), [measured])
