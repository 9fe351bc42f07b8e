"""Elastic helix: chunks of rounds, their plans and costs, and that wrong ones are refused."""

import json
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.elastic import ElasticJob, ElasticPlan, ideal_costs, plan_evaluation, predict_chunk_costs
from helixpipe.elastic.chunks import ChunkKind
from helixpipe.elastic.costs.layer_cut import CutLevel
from helixpipe.elastic.round_recipe import RoundRecipe
from helixpipe.elastic.round_schedule import costs_of_rounds, owned_segments, round_plan
from helixpipe.elastic.sample import skewed_lengths
from helixpipe.elastic.search.quick_plan import plan_quickly
from helixpipe.elastic.search.round_planner import plan_rounds
from helixpipe.elastic.search.rounds import fill_rounds, make_rounds
from helixpipe.plan import PlanError, ScheduleRequest, validate
from helixpipe.plan.build import complete
from helixpipe.plan.cost_model import HARDWARE, MODELS, Recompute, Workload, costs_of_plan, predict_pieces
from helixpipe.plan.schedules import SCHEDULES
from helixpipe.plan.simulation.costs import Costs, SegmentCost, parse_costs
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.slice_ends import with_slice_ends

COSTS = ideal_costs(balanced_length=1000.0)
MIXED = (900, 20, 350, 75, 75, 640, 10, 128)
# One giant, many tiny ones, equal ones, one for each chunk, fewer tokens than chunks, and a mixture.
BATCHES = [(5000,), (9,) * 40, (300,) * 7, (512,) * 6, (1, 1, 2), MIXED, (4000, 3, 2000)]


def rounds(lengths, p=3, count=1, fold=2, costs=COSTS):
    return make_rounds(lengths, costs, p, count, fold, "none")


def forward_ms(chunk, costs=COSTS):
    return costs.forward.layer_time(chunk.area, chunk.tokens, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(1, 40), st.integers(1, 6000)), min_size=1, max_size=30),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_every_token_is_in_one_chunk_and_every_sequence_in_one_round(lengths, p, count, fold):
    recipe = rounds(lengths, p, count, fold)
    recipe.check(lengths)
    assert RoundRecipe.from_dict(json.loads(recipe.to_json())) == recipe
    assert 1 <= len(recipe.rounds) <= count
    for slots in recipe.rounds:
        assert len(slots) == p
        assert max(slots) - min(slots) <= 1
        assert max(slots) <= fold
    for attention_range in ("core", "block"):
        plan = round_plan(replace(recipe, attention_range=attention_range), 2)
        validate(plan)
        assert plan.slices == recipe.slices


@pytest.mark.parametrize("lengths", [(50000,), (12800,) * 7, skewed_lengths(64), (90000, 300, 20000, 20000)])
def test_forwards_of_a_round_take_equally_long(lengths):
    """Up to what rounding to tiles and moving to a sequence's end change: 2% each way, and half a tile."""
    recipe = rounds(lengths, 4)
    for members in recipe.ranges:
        times = [forward_ms(recipe.chunks[i]) for i in members]
        part = sum(times) / 8
        assert len(times) == 8
        slowest = COSTS.forward.layer_time(2 * 64 * max(lengths), 64, 1)
        assert all(abs(ms - part) <= 0.041 * part + 2 * slowest for ms in times)


def test_a_chunk_has_the_tail_of_one_and_the_head_of_the_next():
    recipe = rounds((602, 500, 40, 30, 400), p=2, costs=ideal_costs(balanced_length=1e9))
    pieces = [[(p.sequence, p.start, p.length) for p in chunk.pieces] for chunk in recipe.chunks]
    # 1572 tokens in 4 chunks, the longest first: cuts at 393, 786 and 1179.
    assert pieces == [
        [(0, 0, 393)],
        [(0, 393, 209), (1, 0, 184)],
        [(1, 184, 316), (4, 0, 77)],
        [(4, 77, 323), (2, 0, 40), (3, 0, 30)],
    ]
    kinds = [chunk.kind for chunk in recipe.chunks]
    assert kinds == [ChunkKind.SPLIT, ChunkKind.HYBRID, ChunkKind.HYBRID, ChunkKind.HYBRID]
    assert [chunk.continued_tokens for chunk in recipe.chunks] == [393, 184, 77, 0]
    assert recipe.slices == ((0, 1), (1, 2), (2, 3))


def test_a_cut_close_to_a_sequences_end_moves_there():
    costs = ideal_costs(balanced_length=1e9)
    assert [c.lengths for c in rounds((1003, 1000, 997, 1000), p=2, costs=costs).chunks] == [
        (1003,), (1000,), (1000,), (997,)
    ]  # fmt: skip
    cut = rounds((1100, 1000, 1000, 900), p=2, costs=costs)
    assert any(len(chunk.sliced_sequences) == 1 for chunk in cut.chunks)


def test_rounds_take_equally_many_tokens_as_far_as_sequences_stay_whole():
    lengths = [10, 1000, 20, 500, 480, 30, 990]
    assert fill_rounds(lengths, 3) == [[1], [6], [3, 4, 5, 2, 0]]
    assert fill_rounds([5, 5], 4) == [[0], [1]]


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_one_sequence_is_planned_as_sliced_helix_plans_it(fold):
    """The same object but for names."""
    recipe = rounds((50000,), 4, fold=fold)
    found = round_plan(recipe, 5)
    request = ScheduleRequest(
        num_ranks=4, num_layers=5, num_microbatches=1, num_fold=fold, head_placement="spread"
    )
    other = SCHEDULES["sliced-helix"].plan(request)
    for name in ("placement", "orders", "slices", "loans", "contexts", "segment_names"):
        assert getattr(found, name) == getattr(other, name)


@pytest.mark.parametrize(
    ("name", "attention_range"),
    [("llama3-8b", "core"), ("gpt-7b", "core"), ("llama3-8b", "qkv"), ("gpt-7b", "block")],
)
def test_costs_are_those_of_the_other_cost_model(name, attention_range):
    """One sequence, as sliced helix plans it with the same slices; tied weights are there once."""
    model = replace(MODELS[name], num_layers=8)
    workload = Workload(model=model, seq_length=65536, tensor_parallel=8)
    hardware = HARDWARE["h20"].without_short_kernel_losses()
    pieces = replace(predict_pieces(workload, hardware), multiprocessors=0)
    costs = predict_chunk_costs(workload, hardware, 4)
    recipe = make_rounds((65536,), costs, 4, 1, 2, "without-attention", attention_range)
    found = costs_of_rounds(recipe, 8, costs)
    request = ScheduleRequest(
        num_ranks=4,
        num_layers=8,
        num_microbatches=1,
        head_placement="spread",
        attention_range=attention_range,
    )
    ends = tuple(chunk.context + chunk.tokens for chunk in recipe.chunks)
    plan = with_slice_ends(SCHEDULES["sliced-helix"].plan(request), ends)
    expected = costs_of_plan(pieces, plan, Recompute.WITHOUT_ATTENTION)
    # The executor's time is told once more, per layer; and collectives start more often in short chunks.
    layer_ms = costs.forward.layer_ms
    for role in ("middle", "attention", "last", *(("qkv",) if attention_range != "core" else ())):
        for i in range(8):
            ours, theirs = found.segments[f"{role}/chunk{i}"], expected.segments[f"{role}/slice{i}"]
            for name in ("forward", "backward", "recompute"):
                whole = getattr(theirs, name) + (theirs.weight if name == "backward" else 0)
                assert getattr(ours, name) == pytest.approx(whole, rel=1e-3, abs=2 * layer_ms)
            # Nobody reads the keys of the last one.
            of_keys = ("context_bytes", "gradient_bytes") if i < 7 else ()
            for name in ("bytes", "workspace_bytes", *of_keys):
                assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-4, abs=2), name
    names = {name.replace("slice", "chunk"): size for name, size in expected.message_bytes.items()}
    # Nobody reads those of the last slot; and with ``core``, it reads those of the one before where they are.
    unread = (4, 5, 6, 7) if attention_range == "core" else (6, 7)
    assert names.keys() - found.message_bytes.keys() == {f"context/chunk{i}" for i in unread}
    for name, size in found.message_bytes.items():
        assert size == pytest.approx(names[name], rel=1e-4, abs=2), name
    assert parse_costs(found.to_json(), round_plan(recipe, 8)) == found, "as a file"
    assert found.loan_bytes == expected.loan_bytes
    for rank in range(4):
        static = expected.rank(rank).static_bytes
        assert found.rank(rank).static_bytes == pytest.approx(static, rel=1e-6), rank


def test_uniform_chunks_take_the_closed_form():
    """Sequences as long as chunks and free messages: the form of sliced helix, once for each round."""
    p, fold, layers, tokens = 4, 2, 8, 256
    costs = ideal_costs(balanced_length=tokens / 4)  # attention takes four times as long as the rest
    recipe = rounds((tokens,) * p * fold * 3, p, 3, fold, costs)
    assert not recipe.slices
    found = simulate(round_plan(recipe, layers), costs_of_rounds(recipe, layers, costs)).timeline.makespan_ms
    segment, attention = (fold * x for x in (1e-3 * tokens, 4e-3 * tokens))
    sides = 1 + 2  # backward takes twice as long
    bubble = p - 1 - (1 - 1 / fold) * (1 + 0.25)
    assert found == pytest.approx(3 * sides * (layers * (segment + attention) + bubble * segment), rel=1e-9)


@pytest.mark.parametrize("lengths", BATCHES)
def test_plans_are_valid_with_messages_and_in_evaluation(lengths):
    for p, count, fold, layers in ((1, 1, 2, 1), (2, 2, 3, 2), (3, 2, 2, 4)):
        plan = complete(round_plan(rounds(lengths, p, count, fold), layers))
        assert type(plan).from_json(plan.to_json()) == plan
        validate(plan.forward_only())


def test_changed_plans_are_refused():
    """Any operation dropped, doubled, given to another rank, or exchanged with one that needs it."""
    plan = complete(round_plan(rounds(MIXED, 3, 2), 3))
    generator = random.Random(5)
    for number in range(120):
        orders = [list(order) for order in plan.orders]
        rank = generator.randrange(3)
        place = generator.randrange(len(orders[rank]))
        op = orders[rank][place]
        if number % 3 == 0:
            del orders[rank][place]
        elif number % 3 == 1:
            orders[rank].insert(generator.randrange(len(orders[rank])), op)
        else:
            orders[(rank + 1) % 3].insert(place % len(orders[(rank + 1) % 3]), orders[rank].pop(place))
        with pytest.raises(PlanError):
            validate(plan.with_orders(orders))


def job(limit_bytes=2**50, **changes):
    sizes = {"num_stages": 4, "num_layers": 8, "memory_limit_bytes": int(limit_bytes)}
    return ElasticJob(**{"costs": COSTS, **sizes, **changes})


def three_levels(costs=COSTS):
    """Costs with two levels more, the last of which keeps a third and repeats half of the forward."""
    none = costs.cut.levels[0]
    more = [
        replace(
            none,
            recompute=name,
            after_bytes=none.after_bytes * share,
            before_again=again / 5,
            after_again=again * 4 / 5,
        )
        for name, share, again in (("products", 0.6, 0.1), ("without-attention", 0.1, 0.5))
    ]
    return replace(costs, cut=replace(costs.cut, levels=(none, *more)))


def test_more_rounds_and_then_recomputation_make_it_fit():
    lengths = skewed_lengths(48)
    costs = three_levels()
    free = plan_rounds(lengths, job(costs=costs))
    assert free.prediction.recompute == 0
    assert ElasticPlan.from_json(free.to_json()) == free
    peak = max(free.prediction.peak_with_messages)
    found = []
    for share in (0.8, 0.5, 0.35):
        limited = plan_rounds(lengths, job(share * peak, costs=costs))
        assert max(limited.prediction.peak_with_messages) <= share * peak
        found.append(limited)
    times = [plan.prediction.time_ms for plan in (free, *found)]
    assert all(a <= b * 1.02 for a, b in pairwise(times))
    assert len(found[0].recipe.rounds) > len(free.recipe.rounds) or found[0].recipe.recompute != "none"
    assert found[-1].recipe.recompute == "without-attention"
    with pytest.raises(ValueError, match=r"no elastic helix fits; .* short of memory .*or a higher limit"):
        plan_rounds(lengths, job(0.02 * peak, costs=costs))
    with pytest.raises(ValueError, match="raise the token capacity"):
        plan_rounds(lengths, job(costs=costs, token_capacity=100))


def test_a_built_model_has_one_level_which_plans_take():
    """Also the quick plan, and that of an evaluation."""
    the_job = job(costs=three_levels(), schedule="elastic-helix", recompute="products")
    for plan in (plan_rounds(MIXED, the_job), plan_quickly(MIXED, the_job)):
        assert (plan.plan.schedule, plan.recipe.recompute) == ("elastic-helix", "products")
        assert plan.prediction.recompute > 0
    recipe = plan_evaluation(MIXED, the_job)
    assert isinstance(recipe, RoundRecipe)
    assert recipe.recompute == "products"
    recipe.check(MIXED)
    with pytest.raises(ValueError, match="no level of recomputation 'products'"):
        plan_rounds(MIXED, job(recompute="products"))


def test_weights_are_where_plans_of_any_batch_have_them():
    for p, layers in ((1, 2), (3, 4), (4, 4)):
        plan = round_plan(rounds(MIXED, p), layers)
        for rank in range(p):
            owned = [s for s in range(0, plan.num_segments, 2) if plan.owner_of(s) == rank]
            assert owned_segments(layers, p, rank, "core") == owned
        plan = round_plan(replace(rounds(MIXED, p), attention_range="block"), layers)
        for rank in range(p):
            owned = [s for s in range(0, plan.num_segments, 3) if plan.owner_of(s) == rank]
            assert owned_segments(layers, p, rank, "block") == owned


def test_costs_without_a_cut_are_refused_by_name():
    with pytest.raises(ValueError, match='no "cut"; make them anew'):
        plan_rounds((100, 200), job(costs=replace(COSTS, cut=None)))


def test_a_level_that_the_costs_do_not_know_is_refused():
    recipe = replace(rounds(MIXED), recompute="products")
    with pytest.raises(ValueError, match=r"no level of recomputation 'products'; known: none"):
        costs_of_rounds(recipe, 2, COSTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recompute": "nothing"}, "recompute 'nothing' is none of"),
        ({"attention_range": "all"}, "attention_range 'all' is none of core, qkv, block"),
        ({"rounds": []}, "the same number of slots"),
        ({"rounds": [[2, 2, 2], [2, 2]]}, "the same number of slots"),
        ({"rounds": [[2, 2, 2], [0, 0, 0]]}, "and a chunk in one"),
        ({"rounds": [[2, 2, 3]]}, "do not add up to 6"),
        ({"rounds": [[1, 0, 0], [1, 2, 2]]}, "in consecutive chunks of one round"),
        ({"rounds": 3}, '"rounds" must be a list'),
        ({"rounds": [[2, -2, 6]]}, '"rounds" must hold whole numbers'),
    ],
)
def test_wrong_recipes(changes, words):
    data = json.loads(rounds(MIXED).to_json())
    RoundRecipe.from_dict(data)
    with pytest.raises(ValueError, match=f"not a recipe: .*{words}"):
        RoundRecipe.from_dict({**data, **changes})


def test_a_chunk_between_the_slices_of_a_sequence_is_refused():
    data = json.loads(rounds((900, 300), p=2).to_json())
    chunks = data["chunks"]
    data["sequence_lengths"].append(5)
    chunks.insert(1, [[2, 0, 5]])
    data["rounds"][0][0] += 1
    with pytest.raises(ValueError, match="in consecutive chunks of one round, those of chunks 0, 2"):
        RoundRecipe.from_dict(data)


def test_a_plan_that_is_not_its_recipes_is_refused():
    plan = plan_rounds(MIXED, job())
    data = json.loads(plan.to_json())
    data["recipe"]["rounds"] = [list(reversed(slots)) for slots in data["recipe"]["rounds"]]
    data["recipe"]["rounds"][0][0] += 1
    data["recipe"]["rounds"][0][-1] -= 1
    with pytest.raises(PlanError, match="not that of its recipe"):
        ElasticPlan.from_json(json.dumps(data))


def test_bytes_of_keys_are_those_of_the_head_alone():
    """A chunk's message has the keys of the piece that goes on, and the owner holds them and no others."""
    recipe = rounds((602, 500, 40, 30, 400), p=2, costs=ideal_costs(balanced_length=1e9))
    costs = costs_of_rounds(recipe, 2, COSTS)
    assert [costs.segments[f"attention/chunk{i}"].context_bytes for i in range(4)] == [393, 184, 77, 0]
    plan = complete(round_plan(recipe, 2))
    none = {name: replace(cost, context_bytes=0) for name, cost in costs.segments.items()}
    assert peak_bytes(plan, costs) != peak_bytes(plan, Costs(none, {"*": 0.0}))
    assert all(isinstance(cost, SegmentCost) for cost in costs.segments.values())


def test_measured_shares_may_add_up_to_a_little_more_than_all():
    """What is computed again before attention and behind it, where that is everything."""
    level = {"recompute": "full", "before_bytes": 1.0, "attention_bytes": 1.0, "after_bytes": 1.0}
    before_again, after_again = 0.6, 0.4000000000000002
    assert before_again + after_again > 1
    CutLevel(**level, before_again=before_again, after_again=after_again)
    with pytest.raises(ValueError, match=r"together at most 1$"):
        CutLevel(**level, before_again=before_again, after_again=0.41)
