"""Every schedule: who runs what, in which order. Definitions are written out here a second time."""

import re
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.plan import Kind, Operation, Plan, ScheduleRequest, build_plan, validate
from helixpipe.plan.deadlock import find_deadlock
from helixpipe.plan.plan import orders_from_csv
from helixpipe.plan.schedules import planned_ahead
from helixpipe.plan.simulation.memory import peak_activations

MANY = settings(max_examples=60, deadline=None)


def request(p, layers, m, **options):
    return ScheduleRequest(num_ranks=p, num_layers=layers, num_microbatches=m, **options)


def helix(p, layers, m, fold, **options):
    return build_plan("helix", request(p, layers, m, num_fold=fold), **options)


@st.composite
def arguments(draw):
    """(schedule, request) that fit together."""
    schedule = draw(st.sampled_from(sorted(planned_ahead())))
    p, layers_per_rank = draw(st.integers(1, 16)), draw(st.integers(1, 2))
    rounds = draw(st.integers(1, 3 if p < 9 else 1))
    if schedule == "helix":
        fold = draw(st.integers(1, 3 if p < 9 else 2))
        attention_range = draw(st.sampled_from([None, "core", "qkv", "block"]))
        return schedule, request(
            p, p * layers_per_rank, p * fold * rounds, num_fold=fold, attention_range=attention_range
        )
    if schedule == "interleaved":
        v = draw(st.integers(1, 3))
        return schedule, request(p, p * v * layers_per_rank, p * rounds, virtual_stages=v)
    if schedule == "seq1f1b":
        num_slices, m = draw(st.none() | st.integers(1, 6)), draw(st.integers(1, 12))
        return schedule, request(p, p * layers_per_rank, m, num_slices=num_slices)
    return schedule, request(p, 2 * p * layers_per_rank, draw(st.integers(1, 2 * p + 3)))


@MANY
@given(arguments())
def test_plans_are_complete_and_never_block(case):
    schedule, wanted = case
    for plan in (build_plan(schedule, wanted), build_plan(schedule, wanted, compute_only=True)):
        validate(plan)
        assert not find_deadlock(plan, rendezvous=False)
        assert not find_deadlock(plan, rendezvous=True)
        found = Counter((rank, op) for rank, order in enumerate(plan.orders) for op in order)
        compute = {(rank, op) for rank, op in found if op.kind.is_compute}
        assert compute == {
            (plan.rank_of(segment, i), Operation(segment, kind, i))
            for segment, kind, i in product(
                range(plan.num_segments),
                (Kind.F, Kind.B, Kind.W) if plan.splits_backward else (Kind.F, Kind.B),
                range(plan.num_microbatches),
            )
        }
        assert max(found.values()) == 1
        validate(plan.forward_only())


@MANY
@given(arguments())
def test_plan_round_trips(case):
    plan = build_plan(*case)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.fingerprint == plan.fingerprint
    assert orders_from_csv(plan.to_csv()) == plan.orders


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("gpipe", request(16, 16, 32)),
        ("1f1b", request(16, 32, 64)),
        ("interleaved", request(16, 64, 32, virtual_stages=4)),
        ("helix", request(16, 32, 32, num_fold=2)),
        ("helix", request(12, 12, 48, num_fold=2)),
        ("helix", request(16, 16, 48, num_fold=3)),
        ("zb-h1", request(16, 32, 64)),
        ("zb-v", request(16, 32, 64)),
        ("v-half", request(16, 32, 64)),
        ("v-min", request(15, 30, 64)),
        ("dualpipe-v", request(16, 32, 64)),
        ("seq1f1b", request(16, 32, 16, num_slices=8)),
    ],
)
def test_large_plans_never_block(schedule, wanted):
    plan = build_plan(schedule, wanted)
    assert not find_deadlock(plan, rendezvous=False)
    assert not find_deadlock(plan, rendezvous=True)


def test_gpipe_order():
    plan = build_plan("gpipe", request(2, 2, 2), compute_only=True)
    assert plan.to_csv() == "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n"
    assert plan.segment_names == ("stage0", "stage1")


def test_one_f_one_b_order():
    plan = build_plan("1f1b", request(3, 6, 4), compute_only=True)
    assert plan.to_csv().splitlines() == [
        "0F0,0F1,0F2,0B0,0F3,0B1,0B2,0B3",
        "1F0,1F1,1B0,1F2,1B1,1F3,1B2,1B3",
        "2F0,2B0,2F1,2B1,2F2,2B2,2F3,2B3",
    ]


def test_interleaved_order():
    plan = build_plan("interleaved", request(2, 4, 4, virtual_stages=2), compute_only=True)
    assert plan.to_csv().splitlines() == [
        "0F0,0F1,2F0,2F1,0F2,2B0,0F3,2B1,2F2,0B0,2F3,0B1,2B2,2B3,0B2,0B3",
        "1F0,1F1,3F0,3B0,3F1,3B1,1F2,1B0,1F3,1B1,3F2,3B2,3F3,3B3,1B2,1B3",
    ]
    assert [row[0] for row in plan.placement] == [0, 1, 0, 1]


def test_helix_order():
    plan = helix(2, 2, 4, 2, compute_only=True)
    assert plan.to_csv().splitlines() == [
        "0F0,0F1,0F2,0F3,1F2,1F3,3F0,3F1,4F0,4F1,4F2,4F3,4B3,4B2,4B1,4B0,3B1,3B0,1B3,1B2,0B3,0B2,0B1,0B0",
        "1F0,1F1,2F0,2F1,2F2,2F3,3F2,3F3,3B3,3B2,2B3,2B2,2B1,2B0,1B1,1B0",
    ]
    assert plan.segment_names == ("first", "attention", "middle", "attention", "last")


HELIX = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@MANY
@given(HELIX)
def test_helix_placement(sizes):
    p, layers_per_rank, fold, rounds = sizes
    layers = p * layers_per_rank
    plan = helix(p, layers, p * fold * rounds, fold, compute_only=True)
    assert plan.num_segments == 2 * layers + 1
    for i in range(plan.num_microbatches):
        slot = (i % (p * fold)) // fold
        for layer in range(layers + 1):
            assert plan.rank_of(2 * layer, i) == layer % p
        for layer in range(layers):
            rank = plan.rank_of(2 * layer + 1, i)
            assert rank == (layer + slot + 1) % p
            # Slot 0 computes attention where the next segment is, the last slot where the previous one was.
            if slot == 0:
                assert rank == plan.rank_of(2 * layer + 2, i)
            if slot == p - 1:
                assert rank == plan.rank_of(2 * layer, i)
    for layer in range(layers):
        ranks = Counter(plan.placement[2 * layer + 1])
        assert set(ranks.values()) == {fold * rounds}, "attention of a layer is spread evenly over all ranks"
        assert len(ranks) == p


def helix_forward(rank, p, layers, fold, first):
    """Design 3.2: warm-up attention, then a parameter segment and p attention slots in turn."""
    tasks = [(2 * (rank - 1 - k) + 1, k) for k in reversed(range(rank))]
    layer = rank
    while layer <= layers:
        tasks += [(2 * layer, slot) for slot in range(p)]
        if layer < layers:
            tasks += [(2 * (layer + k) + 1, p - 1 - k) for k in range(p) if layer + k < layers]
        layer += p
    return [(segment, first + slot * fold + j) for segment, slot in tasks for j in range(fold)]


@MANY
@given(HELIX)
def test_helix_forward_order_and_reversed_backward(sizes):
    p, layers_per_rank, fold, rounds = sizes
    layers = p * layers_per_rank
    plan = helix(p, layers, p * fold * rounds, fold, compute_only=True)
    for rank, order in enumerate(plan.orders):
        expected = []
        for number in range(rounds):
            forward = helix_forward(rank, p, layers, fold, number * p * fold)
            expected += [Operation(segment, Kind.F, i) for segment, i in forward]
            expected += [Operation(segment, Kind.B, i) for segment, i in forward[::-1]]
        assert list(order) == expected


def test_helix_memory_does_not_grow_with_rounds():
    assert peak_activations(helix(4, 8, 8, 2)) == peak_activations(helix(4, 8, 32, 2))


def test_helix_ranges_share_one_order():
    plans = [build_plan("helix", request(2, 2, 4, attention_range=name)) for name in ("core", "qkv", "block")]
    computed = {plan.compute_only().orders for plan in plans}
    assert len(computed) == 1
    assert plans[1].orders == plans[2].orders != plans[0].orders, "the wider ranges have loans"
    assert [plan.parameters["attention_range"] for plan in plans] == ["core", "qkv", "block"]
    # Ranks compare fingerprints, so plans that move other tensors must not look alike.
    assert len({plan.fingerprint for plan in plans}) == 3


def test_defaults_are_recorded():
    assert build_plan("helix", request(2, 2, 4)).parameters == {
        "num_layers": 2,
        "num_fold": 2,
        "attention_range": "core",
    }
    assert build_plan("interleaved", request(2, 4, 4)).parameters["virtual_stages"] == 2
    assert build_plan("seq1f1b", request(2, 4, 4)).parameters == {"num_layers": 4, "num_slices": 4}
    for schedule in ("gpipe", "1f1b", "zb-h1", "zb-v", "v-half", "v-min", "dualpipe-v"):
        assert build_plan(schedule, request(2, 4, 4)).parameters == {"num_layers": 4}


@pytest.mark.parametrize(
    ("schedule", "wanted", "message"),
    [
        ("helx", request(2, 2, 4), "unknown schedule 'helx'; did you mean helix? known: gpipe, 1f1b, "),
        ("zzz", request(2, 2, 4), "unknown schedule 'zzz'; known: gpipe, "),
        ("1f1b", request(2, 2, 4, num_fold=2), "--num-fold does not apply to 1f1b"),
        ("gpipe", request(2, 2, 4, virtual_stages=2), "--virtual-stages does not apply to gpipe"),
        (
            "interleaved",
            request(2, 4, 4, attention_range="core"),
            "--attention-range does not apply to interleaved; remove it (it is for helix, sliced-helix)",
        ),
        (
            "helix",
            request(4, 3, 8),
            "the number of layers (3) must be at least the pipeline-parallel size (4); use at most that",
        ),
        (
            "helix",
            request(4, 8, 3),
            "the number of micro batches (3) must be at least the pipeline-parallel size (4); use 4, fewer",
        ),
        ("1f1b", request(4, 6, 8), "the number of layers (6) must be a multiple of"),
        (
            "interleaved",
            request(2, 6, 4, virtual_stages=2),
            "times the virtual stages per rank (4); use 4 or 8",
        ),
        ("interleaved", request(2, 4, 3), "the number of micro batches (3) must be a multiple of"),
        ("zb-v", request(4, 12, 8), "times the virtual stages per rank (8); use 8 or 16"),
        ("zb-v", request(2, 4, 4, virtual_stages=2), "--virtual-stages does not apply to zb-v"),
        (
            "1f1b",
            request(2, 4, 4, num_slices=2),
            "--num-slices does not apply to 1f1b; remove it (it is for",
        ),
    ],
)
def test_wrong_arguments_say_what_to_change(schedule, wanted, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build_plan(schedule, wanted)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_layers", 0, "the number of layers must be at least 1, not 0"),
        ("num_ranks", -1, "the pipeline-parallel size must be at least 1, not -1"),
        ("num_microbatches", 0, "the number of micro batches must be at least 1"),
        ("num_fold", 0, "the fold must be at least 1"),
        ("virtual_stages", 0, "the number of virtual stages must be at least 1"),
        ("num_slices", 0, "the number of slices must be at least 1"),
        ("attention_range", "all", "unknown attention range 'all'; choose one of core, qkv, block"),
    ],
)
def test_impossible_requests(option, value, message):
    sizes = {"num_layers": 4, "num_ranks": 2, "num_microbatches": 4}
    with pytest.raises(ValueError, match=message):
        ScheduleRequest(**{**sizes, option: value})
