"""Plans over chunks: valid in the common form, ordered by slices, with the chunks in flight they claim."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.elastic import Chunk, ElasticPlan, Piece, Recipe, costs_of_recipe, ideal_costs
from helixpipe.elastic.chunk_schedule import (
    backward_order,
    elastic_plan,
    in_flight,
    order_chunks,
    sequence_groups,
)
from helixpipe.elastic.elastic_plan import Prediction
from helixpipe.elastic.search.sequence_processor import equal_time_mesh, make_chunks
from helixpipe.plan import Kind, Plan, PlanError, ScheduleRequest, build_plan, validate
from helixpipe.plan.build import complete
from helixpipe.plan.simulation.costs import parse_costs
from helixpipe.plan.simulation.memory import peak_activations
from helixpipe.plan.simulation.network import Network
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.stage_layers import layers_of_stages

COSTS = ideal_costs(balanced_length=100.0)


def recipe_of(lengths, num_slices, num_stages, pipelines=None):
    longest = max(lengths)
    mesh = equal_time_mesh(longest, min(num_slices, longest), COSTS)
    chunks = order_chunks(make_chunks(lengths, mesh, COSTS, longest), COSTS)
    sizes = pipelines or (len(chunks),)
    return Recipe(chunks, sizes, ((0,) * len(chunks),) * num_stages)


def split_everywhere(recipe):
    """Every sequence a pipeline of its own."""
    return replace(recipe, pipelines=tuple(sequence_groups(recipe.chunks)))


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=15),
    st.integers(1, 8),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_plans_are_valid_lowered_and_simulated(lengths, num_slices, num_stages, many):
    recipe = recipe_of(lengths, num_slices, num_stages)
    if many:
        recipe = split_everywhere(recipe)
    plan = complete(elastic_plan(recipe, 8 * num_stages))
    assert Plan.from_json(plan.to_json()) == plan
    costs = costs_of_recipe(recipe, 8 * num_stages, COSTS)
    assert parse_costs(costs.to_json(), plan) == costs
    # Posted where costs say, no message waits for its receive.
    lowered = complete(elastic_plan(recipe, 8 * num_stages), costs)
    assert simulate(lowered, costs).timeline == simulate(plan.compute_only(), costs).timeline
    timeline = simulate(plan, costs).timeline
    assert timeline.makespan_ms >= max(timeline.busy_ms)
    groups = sequence_groups(recipe.chunks)
    if not many:
        expected = [min(len(recipe.chunks), in_flight(q, num_stages, groups)) for q in range(num_stages)]
        assert peak_activations(plan) == expected
        assert groups == sorted(groups, reverse=True)


def test_whole_sequences_alone_are_1f1b():
    lengths = [8] * 6
    recipe = recipe_of(lengths, 1, 4)
    common = build_plan("1f1b", ScheduleRequest(num_layers=4, num_ranks=4, num_microbatches=6))
    assert complete(elastic_plan(recipe, 4)).orders == common.orders


def test_one_sequence_after_another_is_seq1f1b():
    chunks = order_chunks([Chunk((Piece(i, 10 * j, 10, 30),)) for i in range(4) for j in range(3)], COSTS)
    recipe = Recipe(chunks, (12,), ((0,) * 12,) * 2)
    request = ScheduleRequest(num_layers=4, num_ranks=2, num_microbatches=4, num_slices=3)
    common = build_plan("seq1f1b", request)
    assert complete(elastic_plan(recipe, 4)).orders == common.orders
    assert complete(elastic_plan(recipe, 4)).slices == common.slices


def test_backward_order_reverses_slices():
    assert backward_order([3, 1, 2], first=10) == [12, 11, 10, 13, 15, 14]


def test_validation_sees_slice_dependencies():
    recipe = recipe_of([300, 20, 20], 3, 2)
    plan = complete(elastic_plan(recipe, 2))
    order = [op for op in plan.compute_only().orders[0] if op.kind is Kind.B]
    i, j = (next(k for k, op in enumerate(order) if op.micro_batch == c) for c in (2, 1))
    assert i < j
    swapped = list(plan.compute_only().orders[0])
    a, b = swapped.index(order[i]), swapped.index(order[j])
    swapped[a], swapped[b] = swapped[b], swapped[a]
    with pytest.raises(PlanError, match="stands before"):
        validate(plan.compute_only().with_orders([swapped, *plan.compute_only().orders[1:]]))


def test_messages_have_the_chunks_sizes():
    linked = replace(COSTS, network=Network(latency_ms=1.0, gb_per_s=1.0))
    recipe = recipe_of([300, 20, 20], 3, 2)
    costs = costs_of_recipe(recipe, 2, linked)
    plan = complete(elastic_plan(recipe, 2))
    assert parse_costs(costs.to_json(), plan) == costs
    for i, chunk in enumerate(recipe.chunks):
        assert costs.num_bytes(f"stage0/chunk{i}", f"stage1/chunk{i}") == chunk.tokens
    free = simulate(plan, costs_of_recipe(recipe, 2, COSTS)).timeline.makespan_ms
    assert simulate(plan, costs).timeline.makespan_ms > free + 1.0


def test_recipe_round_trip():
    recipe = split_everywhere(recipe_of([300, 200, 20, 20], 4, 2))
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequence_lengths": [300, 21]}, "tokens of sequence 1 are not in one chunk each"),
        ({"pipelines": [1]}, "do not add up"),
        ({"checkpointed": [[0]]}, "checkpointed needs"),
        ({"checkpointed": [[-1]]}, "not negative"),
        ({"stage_layers": [3]}, r"stage_layers \[3\] are not one or more layers for each of 2 stages"),
        ({"stage_layers": [3, 0]}, "are not one or more layers for each of 2 stages"),
        ({"stage_layers": 3}, '"stage_layers" must be a list'),
        ({"chunks": [[[0, 0, 0]]]}, "no part of a sequence"),
        ({"chunks": [[[0, 0]]]}, r"a piece is \[sequence, start, length\]"),
        ({"chunks": [[]]}, "is not empty"),
        ({"chunks": 3}, '"chunks" must be a list'),
    ],
)
def test_wrong_recipes(change, words):
    data = {**recipe_of([300, 20], 3, 2).to_dict(), **change}
    with pytest.raises(ValueError, match=words):
        Recipe.from_dict(data)


def test_an_elastic_plan_is_read_back_and_held_against_its_recipe():
    recipe = recipe_of([300, 20, 20], 3, 2)
    plan = ElasticPlan(
        recipe, complete(elastic_plan(recipe, 4)), Prediction(1.5, 0.25, 0.0, (3, 4), (1, 2)), 0.5
    )
    text = plan.to_json()
    assert ElasticPlan.from_json(text) == plan
    assert ElasticPlan.from_json(text).fingerprint == plan.fingerprint
    assert Plan.from_json(text) == plan.plan
    other = replace(plan, recipe=replace(recipe, checkpointed=((1,) * len(recipe.chunks),) * 2))
    assert other.fingerprint != plan.fingerprint
    too_many = replace(plan, recipe=replace(recipe, checkpointed=((3,) * len(recipe.chunks),) * 2))
    with pytest.raises(ValueError, match="more than the 2 layers"):
        ElasticPlan.from_json(too_many.to_json())
    foreign = replace(plan, recipe=split_everywhere(recipe))
    with pytest.raises(ValueError, match="order is not that of its recipe"):
        ElasticPlan.from_json(foreign.to_json())
    common = build_plan("1f1b", ScheduleRequest(num_layers=2, num_ranks=2, num_microbatches=2))
    with pytest.raises(ValueError, match="its schedule is '1f1b'"):
        ElasticPlan.from_json(common.to_json())


def test_uneven_stages_are_in_plan_costs_and_file():
    recipe = replace(recipe_of([300, 20, 20], 3, 2), stage_layers=(3, 1))
    assert Recipe.from_json(recipe.to_json()) == recipe
    plan = complete(elastic_plan(recipe, 4))
    assert plan.orders == complete(elastic_plan(replace(recipe, stage_layers=()), 4)).orders
    assert [len(own) for own in layers_of_stages(plan)] == [3, 1]
    costs = costs_of_recipe(recipe, 4, replace(COSTS, layer_state_bytes=7))
    long, short = (costs.segments[f"stage{stage}/chunk0"] for stage in (0, 1))
    assert (long.forward, long.bytes) == pytest.approx((3 * short.forward, 3 * short.bytes))
    assert [rank.static_bytes for rank in costs.ranks] == [21, 7]
    found = ElasticPlan(recipe, plan, Prediction(1.5, 0.25, 0.0, (3, 4), (1, 2)))
    assert ElasticPlan.from_json(found.to_json()) == found
    wrong = {
        "more than the 1 layers": replace(recipe, checkpointed=((2,) * len(recipe.chunks),) * 2),
        "order is not that of its recipe": replace(recipe, stage_layers=()),
    }
    for message, other in wrong.items():
        with pytest.raises(ValueError, match=message):
            ElasticPlan.from_json(replace(found, recipe=other).to_json())
    beyond = replace(recipe, stage_layers=(3, 2))
    with pytest.raises(ValueError, match="3,2 layers by stage are 5 layers in 2 stages"):
        ElasticPlan.from_json(replace(found, recipe=beyond, plan=complete(elastic_plan(beyond, 4))).to_json())


def test_plans_of_other_recipes_differ():
    recipe = recipe_of([300, 20, 20], 3, 2)
    assert elastic_plan(recipe, 2) != elastic_plan(split_everywhere(recipe), 2)
