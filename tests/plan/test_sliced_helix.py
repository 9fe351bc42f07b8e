"""Sliced helix: its published checks, closed form and memory, on the project's simulator."""

import json
import random
from fractions import Fraction
from functools import cache
from itertools import pairwise, product

import pytest

from helixpipe.__main__ import main
from helixpipe.plan import Kind, Plan, ScheduleRequest, build_plan, validate
from helixpipe.plan.deadlock import find_deadlock
from helixpipe.plan.device_model import DEVICE_MODELS, find_stall
from helixpipe.plan.equal_time import equal_time_end
from helixpipe.plan.schedules import SCHEDULES
from helixpipe.plan.simulation.costs import Costs, SegmentCost
from helixpipe.plan.simulation.network import Network
from helixpipe.plan.simulation.simulate import simulate

P, LAYERS, TOKENS, HIDDEN, WORDS = 8, 32, 131072, 4096, 50304
# Floating-point operations per millisecond of the 8 GPUs of a rank.
PRODUCTS, ATTENTION = 8 * 120e9, 8 * 95e9
GIGABYTES_PER_SECOND = 8 * 50


def placed(p, layers, fold, m=1, **options):
    """The plan without messages and unchecked."""
    request = ScheduleRequest(num_ranks=p, num_layers=layers, num_microbatches=m, num_fold=fold, **options)
    return SCHEDULES["sliced-helix"].plan(request)


def lowered(*args, **options):
    p, layers, fold, *m = args
    request = ScheduleRequest(
        num_ranks=p, num_layers=layers, num_fold=fold, num_microbatches=m[0] if m else 1, **options
    )
    return build_plan("sliced-helix", request)


def layer_ms(groups):
    """Forward times of a layer, and of the head, for the whole sequence; key heads over query heads."""
    product_ms = 2 * TOKENS * HIDDEN**2 / PRODUCTS
    before, after = (1 + 2 * groups) * product_ms, (1 + 8) * product_ms
    return before, 2 * TOKENS**2 * HIDDEN / ATTENTION, after, 2 * TOKENS * HIDDEN * WORDS / PRODUCTS


def published_costs(plan, groups, *, uniform, network=None):
    before, attention, after, head = layer_ms(groups)
    count = plan.num_ranks * plan.parameters["num_fold"]
    linear = before + after
    cuts = [equal_time_end((linear + attention) * j / count, linear, attention) for j in range(count + 1)]
    segments, messages = {}, {}
    for j, (start, end) in enumerate(pairwise(cuts)):
        tokens, area = (1 / count, 1 / count) if uniform else (end - start, end * end - start * start)
        of_role = {"first": before, "middle": after + before, "last": after + head}
        for role, milliseconds in of_role.items():
            segments[f"{role}/slice{j}"] = SegmentCost(milliseconds * tokens, 2 * milliseconds * tokens)
        segments[f"attention/slice{j}"] = SegmentCost(attention * area, 2.5 * attention * area)
        unit = int(TOKENS * tokens * HIDDEN * 2)
        for role in ("first", "middle"):
            messages[f"{role}/slice{j}->attention/slice{j}"] = int((2 + 2 * groups) * unit)
        for role in ("middle", "last"):
            messages[f"attention/slice{j}->{role}/slice{j}"] = 2 * unit
        messages[f"context/slice{j}"] = int(2 * groups * unit)
    return Costs(segments, {}, None if network is None else messages, network)


@pytest.mark.parametrize(("fold", "expected"), [(1, 3561.7), (2, 3384.9)])
def test_the_published_figures_with_messages(fold, expected):
    """128k, MHA, slices of equal forward time, 50 GB/s per GPU between any two ranks."""
    plan = placed(P, LAYERS, fold, head_placement="spread")
    network = Network(latency_ms=0.0, gb_per_s=GIGABYTES_PER_SECOND)
    costs = published_costs(plan, 1, uniform=False, network=network)
    assert simulate(plan, costs).timeline.makespan_ms == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("fold", "expected"), [(1, 3317.1), (2, 3306.8)])
def test_the_published_figures_of_uniform_slices(fold, expected):
    """128k, a key head for 4 query heads, free messages; and the closed form for them."""
    plan = placed(P, LAYERS, fold, head_placement="spread")
    found = simulate(plan, published_costs(plan, 0.25, uniform=True)).timeline.makespan_ms
    assert found == pytest.approx(expected, abs=0.05)
    before, attention, after, head = layer_ms(0.25)
    form = closed_form(
        P, LAYERS, fold, before=before / P / fold, after=after / P / fold, attention=attention / P / fold,
        backward=2, attention_backward=2.5, head=head / P / fold,
    )  # fmt: skip
    assert found == pytest.approx(form, rel=1e-12)


def closed_form(p, layers, fold, *, before, after, attention, head, backward, attention_backward):
    """One sequence with a spread head; times are forwards of one slice.

    A slot has ``fold`` slices. The segment between two attentions starts p-1 times before all ranks work; the
    members of the first and the last slot overlap in part.
    """
    slot = fold * (before + after)
    whole = layers * (slot * (1 + backward) + fold * attention * (1 + attention_backward))
    hidden = Fraction(fold - 1, fold) * (slot + fold * before)
    return whole + ((p - 1) * slot - hidden) * (1 + backward) + head * fold * (1 + backward)


def uniform_costs(plan, *, before, after, attention, head, backward, attention_backward):
    of_role = {
        "first": (before, backward),
        "middle": (after + before, backward),
        "last": (after + head, backward),
        "attention": (attention, attention_backward),
    }
    times = {name: of_role[name.partition("/")[0]] for name in plan.cost_names}
    return Costs({name: SegmentCost(time, factor * time) for name, (time, factor) in times.items()}, {})


def is_exact(p, layers, fold):
    """Elsewhere the end of the forward pass is on the rank that starts the backward pass, and costs more."""
    return layers > 1 and (fold == 1 or (p > 2 and layers % p != 2 % p and fold < p))


GRID = [
    (p, layers, fold)
    for p, layers, fold in product((2, 3, 4, 5, 8), (2, 3, 4, 5, 7, 8, 9, 12, 16), (1, 2))
    if is_exact(p, layers, fold)
]


def random_times(seed):
    draw = random.Random(seed)
    before = draw.randint(1, 4)
    after = draw.randint(before, 9)
    return {
        "before": before,
        "after": after,
        "attention": draw.randint(before + after, 60),
        "head": draw.randint(0, 40),
        "backward": 2,
        "attention_backward": draw.randint(2, 3),
    }


@pytest.mark.parametrize(("p", "layers", "fold"), GRID)
def test_closed_form(p, layers, fold):
    """Exact for uniform slices and free messages, attention no shorter than the segment between two."""
    plan = placed(p, layers, fold, head_placement="spread")
    for seed in range(2):
        times = random_times(seed)
        found = simulate(plan, uniform_costs(plan, **times)).timeline.makespan_ms
        assert found == closed_form(p, layers, fold, **times)


@pytest.mark.parametrize("options", [{}, {"head_placement": "spread"}, {"attention_range": "block"}])
def test_sequences_take_as_long_as_one_each(options):
    """T(m) = m T(1): a rank is never early enough to begin the next sequence before the last has ended."""
    for p, layers, fold in ((2, 2, 2), (4, 4, 2), (3, 5, 1)):
        times = []
        for m in (1, 2, 5):
            plan = placed(p, layers, fold, m, **options)
            costs = dict.fromkeys(plan.cost_names, SegmentCost(3.0, 6.0))
            costs |= {name: SegmentCost(8.0, 20.0) for name in costs if name.startswith("attention")}
            times.append(simulate(plan, Costs(costs, {"*": 1.0})).timeline.makespan_ms)
        assert times == [times[0], 2 * times[0], 5 * times[0]]


SIZES = [(2, 3, 2, 2), (3, 4, 2, 1), (4, 1, 3, 1), (5, 3, 1, 2), (8, 9, 1, 1)]
OPTIONS = [
    {"attention_range": attention_range, "head_placement": head, "resend_context": again}
    for attention_range, head, again in product(("core", "qkv", "block"), ("first", "spread"), (None, True))
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_plans_are_valid_in_every_model(sizes):
    for options in OPTIONS[1::3]:  # each range, head and way of lending at least once
        plan = lowered(*sizes, **options)
        assert Plan.from_json(plan.to_json()) == plan
        for variant in (plan, plan.forward_only()):
            validate(variant)
        assert not find_deadlock(plan, rendezvous=True)
        assert not find_deadlock(plan, rendezvous=False)
        assert not any(find_stall(plan, model) for model in DEVICE_MODELS)
        # With its messages it takes as long as without: receives are posted in time.
        costs = Costs(
            {n: SegmentCost(8, 20) if "attention" in n else SegmentCost(3, 6) for n in plan.cost_names}, {}
        )
        bare, full = (simulate(shape, costs).timeline.makespan_ms for shape in (plan.compute_only(), plan))
        assert full >= bare


@pytest.mark.slow
@pytest.mark.parametrize("p", range(2, 9))
def test_every_plan_is_valid_in_every_model(p):
    for layers, fold, options in product((1, p - 1, p, p + 1, 2 * p + 2), (1, 2, 3), OPTIONS):
        plan = lowered(p, max(layers, 1), fold, 2, **options)
        assert not find_deadlock(plan, rendezvous=True)
        assert not any(find_stall(plan, model) for model in DEVICE_MODELS)


def test_attention_of_the_last_slot_is_where_keys_are_made():
    """``core`` lends to all later slots but the last; with QKV moved, to all."""
    for p in (3, 4, 8):
        lent = {
            name: len(placed(p, p, 2, attention_range=name).contexts) for name in ("core", "qkv", "block")
        }
        assert lent["core"] == p * (p - 1) * (p - 2) // 2
        assert lent["qkv"] == lent["block"] == p * p * (p - 1) // 2
    assert not placed(2, 4, 2).contexts


def test_the_keys_of_all_members_leave_before_the_first_attends():
    plan = placed(4, 4, 3, attention_range="block")
    for order in plan.orders:
        forwards = [
            op for op in order if op.kind is Kind.F and plan.segment_names[op.segment] in ("qkv", "attention")
        ]
        for first in range(0, len(forwards), 6):
            names = [plan.segment_names[op.segment] for op in forwards[first : first + 6]]
            assert names == ["qkv"] * 3 + ["attention"] * 3


def test_a_slice_has_its_backward_at_the_end_at_once():
    plan = placed(4, 4, 2, head_placement="spread")
    for order in plan.orders:
        ends = [str(op) for op in order if op.segment == plan.num_segments - 1]
        assert all(b == f.replace("F", "B") for f, b in zip(ends[::2], ends[1::2], strict=True))


def test_the_command_names_slices(tmp_path):
    path, costs = tmp_path / "plan.json", tmp_path / "costs.json"
    sizes = "--num-layers 3 --pipeline-model-parallel-size 4 --num-microbatches 2 --num-fold 2"
    assert main([*f"plan --schedule sliced-helix {sizes} --resend-context --output {path}".split()]) == 0
    plan = Plan.from_json(path.read_text())
    assert plan.num_microbatches == 16
    assert plan.micro_batch_names == tuple(f"slice{i}" for i in range(8)) * 2
    assert "attention/slice3" in plan.cost_names
    names = {name: {"F": 1, "B": 2} for name in plan.cost_names}
    edges = {"*": 1, "middle/slice3->attention/slice3": 2, "context/slice3": 3}
    costs.write_text(json.dumps({"segments": names, "p2p_ms": edges}))
    assert main([*f"simulate --plan {path} --costs {costs} --output {tmp_path / 'result.json'}".split()]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["makespan_ms"] > 0


@cache
def peak(fold, *, again):
    plan = lowered(4, 8, fold, resend_context=again)
    costs = SegmentCost(3.0, 6.0, bytes=30)
    attention = SegmentCost(8.0, 20.0, bytes=20, context_bytes=10, gradient_bytes=10)
    by_name = {n: attention if n.startswith("attention") else costs for n in plan.cost_names}
    return max(simulate(plan, Costs(by_name, {})).peak_bytes)


@pytest.mark.parametrize("fold", [1, 2])
def test_lending_again_holds_less(fold):
    assert peak(fold, again=True) < peak(fold, again=None)
