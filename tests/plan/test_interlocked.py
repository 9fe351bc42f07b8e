"""Interlocked rounds of helix: the keys written out a second time, valid plans of every size, the figures."""

import re
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.__main__ import main
from helixpipe.plan import Kind, Plan, ScheduleRequest, build_plan, validate
from helixpipe.plan.cost_model import HARDWARE, MODELS, Recompute, Workload, costs_of_plan, predict_pieces
from helixpipe.plan.schedules.request import KnownCosts
from helixpipe.plan.simulation.costs import Costs, SegmentCost, uniform_costs
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.plan.simulation.simulate import simulate


def request(p, layers, m, fold=1, **options):
    return ScheduleRequest(
        num_ranks=p,
        num_layers=layers,
        num_microbatches=m,
        num_fold=fold,
        **{"round_order": "interlocked", "head_placement": "spread", **options},
    )


def interlocked(*sizes, **options):
    return build_plan("helix", request(*sizes, **options), compute_only=True)


def times(plan, middle=(1.0, 2.0), attention=(6.0, 14.0), message=0.0, weight=0.5):
    """Costs with forward and whole backward given; ``weight`` of the backward of segments is W."""
    costs = {name: SegmentCost(middle[0], middle[1] - weight, weight, bytes=1) for name in plan.cost_names}
    costs["attention"] = SegmentCost(*attention, bytes=1)
    return Costs(costs, {"*": message})


def keys_of_the_note(p, num_layers, omega, back):
    """The construction as it was first written down; (kind, segment, round, slot) -> key."""
    last = max(1, p - 1)
    alpha, beta, delta = 0.591, -0.052, 0.650 * back + 0.356 * omega
    f, b, lag = 1.197 * omega, 0.871 * omega, 1.389 + 1.179 * omega * (p - 1)
    low, high = f - 0.9 * alpha / last, f + 0.9 * (1 - alpha) / last
    f_attention = min(max(1.069 * omega, low), high)
    b_segment = min(max(0.958 * omega, b - 0.9 * delta / last), b + 0.9 * (1 - delta) / last)

    def key(kind, segment, number, slot):
        layer, is_attention = divmod(segment, 2)
        z, begin = p - 1 - slot, number * num_layers
        if kind is Kind.F:
            if is_attention:
                return begin + layer + alpha + f_attention * slot
            return begin + layer + (alpha / 2 if layer == num_layers else 0) + f * slot
        begin += num_layers + lag + beta
        if layer == num_layers:
            return begin - 0.52 * back + b * z
        begin += num_layers - 1 - layer
        return begin + b * z if is_attention else begin + delta + b_segment * z

    return key


@pytest.mark.parametrize(("p", "layers", "rounds"), [(2, 4, 2), (4, 4, 3), (8, 32, 2), (5, 12, 2)])
def test_ranks_sort_their_operations_by_the_keys_of_the_note(p, layers, rounds):
    plan = interlocked(p, layers, p * rounds, attention_range="block")
    key = keys_of_the_note(p, layers, omega=0.15, back=0.73 * 0.85)
    for order in plan.orders:
        found = [key(op.kind, op.segment, *divmod(op.micro_batch, p)) for op in order]
        assert found == sorted(found)


SIZES = st.tuples(st.integers(1, 6), st.integers(0, 9), st.integers(0, 13), st.integers(1, 2))
OPTIONS = st.fixed_dictionaries(
    {
        "attention_range": st.sampled_from(["core", "qkv", "block"]),
        "head_placement": st.sampled_from(["first", "spread"]),
        "split_weight_gradients": st.sampled_from([None, True]),
        "round_order": st.just("interlocked"),
    }
)


@settings(max_examples=60, deadline=None)
@given(SIZES, OPTIONS, st.booleans())
def test_plans_of_any_size_are_complete_and_never_block(sizes, options, knows_costs):
    p, more_layers, more_micro_batches, fold = sizes
    known = KnownCosts(lambda plan: times(plan, message=0.3)) if knows_costs else None
    plan = build_plan(
        "helix", request(p, p + more_layers, p + more_micro_batches, fold, costs=known, **options)
    )  # which validates it
    assert Plan.from_json(plan.to_json()) == plan
    validate(plan.forward_only())
    everyone = set(range(plan.num_microbatches)) if options["split_weight_gradients"] else set()
    assert plan.split_micro_batches == everyone


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from(["core", "qkv", "block"]), st.sampled_from(["first", "spread"]))
def test_rounds_one_after_the_other_take_any_size_too(sizes, attention_range, head_placement):
    p, more_layers, more_micro_batches, fold = sizes
    build_plan(
        "helix",
        request(
            p, p + more_layers, p + more_micro_batches, fold,
            attention_range=attention_range, head_placement=head_placement, round_order="filo",
        ),
    )  # fmt: skip


def every_size(p):
    """Layers, micro batches and fold as the issue asks: whole and partial rounds, uneven layers."""
    for number, fold in product((p, 2 * p, 4 * p, 2 * p + max(1, p // 2)), (1, 2)):
        for rounds in (1, 2, 3):
            yield number, rounds * p * fold, fold
        yield number, p * fold + max(1, p // 2), fold


@pytest.mark.slow
@pytest.mark.parametrize("p", range(2, 17))
def test_the_whole_grid_is_valid(p):
    for layers, m, fold in every_size(p):
        for splits, knows_costs in product((None, True), (False, True)):
            # List scheduling of many ranks takes minutes; these few stand for the others.
            if knows_costs and p > 8 and (fold == 2 or layers > 2 * p or m > 2 * p):
                continue
            known = KnownCosts(lambda plan: times(plan, message=0.3)) if knows_costs else None
            build_plan(
                "helix",
                request(
                    p, layers, m, fold, split_weight_gradients=splits, costs=known, attention_range="block"
                ),
            )


def test_left_over_micro_batches_sit_in_every_second_slot_of_the_first_round():
    plan = interlocked(8, 8, 20, attention_range="block")
    first_attention = [plan.rank_of(1, i) for i in range(20)]
    assert first_attention == [1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 0, *range(1, 8), 0]
    sizes = sorted(len(loan.micro_batches) for loan in plan.loans if loan.segment == 1)
    assert sizes == [1] * 10 + [2] * 4, "a slot's micro batches share a loan; rank 0's slots need none"


@pytest.mark.parametrize("order", ["filo", "interlocked"])
def test_layers_are_dealt_in_turn_and_the_head_stays_with_the_embedding(order):
    for head in ("first", "spread"):
        plan = interlocked(4, 6, 8, round_order=order, head_placement=head)
        assert [plan.owner_of(segment) for segment in range(0, 13, 2)] == [0, 1, 2, 3, 0, 1, 0]
        ranks = {plan.rank_of(12, i) for i in range(8)}
        assert ranks == ({0} if head == "first" else {0, 1, 2, 3})
    # Spread, the last segment follows the slot's last attention without a message.
    assert plan.placement[11] == plan.placement[12]


def test_a_round_begins_before_the_one_before_has_ended():
    plan = interlocked(4, 8, 12)
    first_b = [next(i for i, op in enumerate(order) if op.kind is Kind.B) for order in plan.orders]
    for order, turn in zip(plan.orders, first_b, strict=True):
        rounds = {op.micro_batch // 4 for op in order[:turn]}
        assert rounds == {0, 1}, "the second round has begun when the first turns back, the third has not"


def test_members_of_a_slot_turn_in_reverse():
    plan = interlocked(2, 2, 4, fold=2)
    for order in plan.orders:
        for segment in range(plan.num_segments):
            forward = [op.micro_batch for op in order if op[:2] == (segment, Kind.F)]
            backward = [op.micro_batch for op in order if op[:2] == (segment, Kind.B)]
            for slot in ({0, 1}, {2, 3}):
                assert [i for i in forward if i in slot] == [i for i in backward if i in slot][::-1]


def test_weight_gradients_follow_their_b_at_once_but_fill_gaps_in_the_last_round():
    known = KnownCosts(lambda plan: times(plan, message=0.1))
    plain = interlocked(4, 8, 12, split_weight_gradients=True)
    listed = interlocked(4, 8, 12, split_weight_gradients=True, costs=known)
    for order in plain.orders:
        for op, following in pairwise(order):
            assert op.kind is not Kind.B or following == op._replace(kind=Kind.W)

    def longest(rounds):
        return max(
            order.index(op) - order.index(op._replace(kind=Kind.B))
            for order in listed.orders
            for op in order
            if op.kind is Kind.W and op.micro_batch // 4 in rounds
        )

    assert longest({0, 1}) <= 2, "a forward with a smaller key may become ready during B"
    assert longest({2}) > 4


def test_costs_are_worth_knowing_and_the_same_for_everybody():
    p, layers, m = 4, 8, 12
    known = KnownCosts(lambda plan: times(plan, message=0.4))

    def makespan(plan):
        return simulate(plan, times(plan, message=0.4)).timeline.makespan_ms

    sorted_ms = makespan(interlocked(p, layers, m))
    listed = interlocked(p, layers, m, costs=known)
    again = KnownCosts(lambda plan: times(plan, message=0.4))
    assert interlocked(p, layers, m, costs=again).fingerprint == listed.fingerprint
    filo = interlocked(p, layers, m, round_order="filo")
    assert makespan(listed) < sorted_ms < makespan(filo)


def test_costs_never_make_an_order_slower_than_keys_alone():
    """Sequences so short that messages take most of the time, far from the jobs of the search."""
    model = replace(MODELS["gpt-7b"], num_layers=8)
    workload = Workload(model=model, seq_length=2048, tensor_parallel=8)
    pieces = predict_pieces(workload, HARDWARE["h20"])
    known = KnownCosts(lambda plan: costs_of_plan(pieces, plan, Recompute.NONE))
    for splits in (None, True):
        plans = [
            interlocked(4, 8, 12, attention_range="block", split_weight_gradients=splits, costs=costs)
            for costs in (None, known)
        ]
        alone, fitted = (simulate(plan, known.of(plan)).iteration_ms for plan in plans)
        assert fitted <= alone


def test_an_order_within_the_memory_limit_is_preferred():
    p, layers, m = 4, 8, 16
    free = interlocked(p, layers, m, costs=KnownCosts(times))
    peak = max(peak_bytes(free, times(free)))
    limited = interlocked(p, layers, m, costs=KnownCosts(times, memory_limit_bytes=peak - 1))
    assert max(peak_bytes(limited, times(limited))) < peak
    assert limited.fingerprint != free.fingerprint


def test_costs_of_nothing_make_a_plan():
    """Even a profile of zeros must end in a valid order."""
    for splits in (None, True):
        known = KnownCosts(lambda plan: uniform_costs(plan, 0.0, 0.0, 0.0))
        build_plan("helix", request(3, 4, 7, costs=known, split_weight_gradients=splits))


KINDS = ("window", "window", "window", "full") * 2


def mixed_costs(plan, window=(1.0, 2.0), full=(6.0, 14.0)):
    costs = dict.fromkeys(plan.cost_names, SegmentCost(2.0, 3.0, 1.0))
    costs |= {"attention.window": SegmentCost(*window), "attention.full": SegmentCost(*full)}
    return Costs(costs, {})


def test_segments_carry_the_kinds_of_their_layers():
    plan = interlocked(4, 8, 8, layer_kinds=KINDS)
    assert plan.segment_names[:9] == (
        "first.window", "attention.window", "middle.window", "attention.window", "middle.window",
        "attention.window", "middle.window.full", "attention.full", "middle.full.window",
    )  # fmt: skip
    assert plan.segment_names[-2:] == ("attention.full", "last.full")
    timeline = simulate(plan, mixed_costs(plan)).timeline
    assert {op.segment % 2 for rank in timeline.spans for op, *_ in rank if timeline.is_attention(op)} == {1}


def test_layers_that_are_not_alike_take_their_part_of_the_clock():
    """A long layer among short ones: keys in time follow it, keys in layers would not."""
    found, blind = (
        interlocked(4, 8, 12, layer_kinds=KINDS, costs=KnownCosts(of))
        for of in (mixed_costs, lambda plan: mixed_costs(plan, (2.25, 5.0), (2.25, 5.0)))
    )
    makespans = [simulate(plan, mixed_costs(plan)).timeline.makespan_ms for plan in (found, blind)]
    assert makespans[0] < makespans[1]


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        (
            (4, 3, 8),
            {},
            "the number of layers (3) must be at least the pipeline-parallel size (4); use at",
        ),
        (
            (4, 8, 3),
            {},
            "the number of micro batches (3) must be at least the pipeline-parallel size (4); use 4",
        ),
        (
            (4, 8, 8),
            {"round_order": "filo", "split_weight_gradients": True},
            "--split-weight-gradients needs --round-order interlocked",
        ),
        ((4, 8, 8), {"round_order": "filo", "costs": KnownCosts(times)}, "--costs needs --round-order"),
        ((4, 8, 8), {"layer_kinds": ("a", "b")}, "2 kinds of layers for 8 layers; give one for each"),
        ((2, 2, 2), {"layer_kinds": ("a", "B.")}, "kind of layer 'B.' must be of small letters"),
        ((4, 8, 8), {"round_order": "lifo"}, "unknown round order 'lifo'; choose one of filo, interlocked"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_work(sizes, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        interlocked(*sizes, **options)
    assert "\n" not in str(caught.value)


def test_other_schedules_have_no_round_order():
    with pytest.raises(ValueError, match="--round-order"):
        build_plan("1f1b", ScheduleRequest(num_ranks=2, num_layers=2, num_microbatches=2, round_order="filo"))


def test_command_line(tmp_path, capsys):
    sizes = (
        "--schedule helix --num-layers 4 --pipeline-model-parallel-size 2 --num-microbatches 6 --num-fold 1"
    )
    arguments = ["plan", *sizes.split(), "--round-order", "interlocked", "--split-weight-gradients"]
    plain, fitted, costs = (tmp_path / name for name in ("plain.json", "fitted.json", "costs.json"))
    assert main([*arguments, "--output", str(plain)]) == 0
    plan = Plan.from_json(plain.read_text())
    assert plan.parameters["round_order"] == "interlocked"
    assert plan.parameters["split_weight_gradients"] is True
    costs.write_text(times(plan, message=2.0).to_json())
    assert main([*arguments, "--costs", str(costs), "--output", str(fitted)]) == 0
    known = KnownCosts(lambda plan: times(plan, message=2.0))
    expected = build_plan(
        "helix", request(2, 4, 6, head_placement=None, split_weight_gradients=True, costs=known)
    )
    assert Plan.from_json(fitted.read_text()) == expected != plan
    costs.write_text("{}")
    capsys.readouterr()
    assert main([*arguments, "--costs", str(costs), "--output", str(fitted)]) != 0
    assert "costs: key 'segments' is missing" in capsys.readouterr().err
