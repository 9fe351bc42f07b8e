"""The simulator: equal, not close, to closed forms and to a recurrence that is written out here again."""

import json
from dataclasses import replace
from graphlib import TopologicalSorter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.plan import Kind, Operation, Plan, ScheduleRequest, build_plan
from helixpipe.plan.simulation.costs import Costs, SegmentCost, parse_costs, uniform_costs
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.simulation.timeline import Span, Timeline


def built(schedule, p, layers, m, *, compute_only=True, **options):
    wanted = ScheduleRequest(num_ranks=p, num_layers=layers, num_microbatches=m, **options)
    return build_plan(schedule, wanted, compute_only=compute_only)


def makespan(plan, forward=1, backward=2, message=0):
    costs = uniform_costs(plan, forward, backward)
    return simulate(plan, Costs(costs.segments, {"*": message})).timeline.makespan_ms


UNITS = [(1, 2), (3, 5), (2, 2)]


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_stage_schedules_equal_their_closed_form(schedule, units):
    forward, backward = units
    for p in range(1, 7):
        for m in range(1, 11):
            plan = built(schedule, p, p, m)
            assert makespan(plan, forward, backward) == (m + p - 1) * (forward + backward)
            timeline = simulate(plan, uniform_costs(plan, forward, backward)).timeline
            assert timeline.busy_ms == [m * (forward + backward)] * p
            assert timeline.bubble_ratio == pytest.approx((p - 1) / (m + p - 1), rel=1e-12, abs=1e-12)


def test_the_well_known_cases():
    assert makespan(built("gpipe", 4, 4, 8)) == 33
    assert makespan(built("1f1b", 4, 4, 8)) == 33
    assert makespan(built("interleaved", 4, 8, 8, virtual_stages=2)) == 57


@pytest.mark.parametrize("units", UNITS)
def test_interleaved_equals_its_closed_form(units):
    forward, backward = units
    for p in range(1, 6):
        for v in range(1, 4):
            for rounds in range(1, 4):
                plan = built("interleaved", p, p * v, p * rounds, virtual_stages=v)
                assert makespan(plan, forward, backward) == (p * rounds * v + p - 1) * (forward + backward)


def test_gpipe_pays_each_hop_once_per_direction():
    for p in range(1, 5):
        for message in (1, 4):
            # Forwards leave back to back: a message delays the wave, not the steps between its operations.
            assert makespan(built("gpipe", p, p, 6), 1, 2, message) == (6 + p - 1) * 3 + 2 * (p - 1) * message


def test_uniform_helix_equals_its_closed_form():
    """m (2L/p + 1) (F + B): the work of rank 0, which never waits.

    Rank 0 owns L/p + 1 parameter segments, all of them for all m micro batches, and attention of L layers for
    m/p micro batches each: m (2L/p + 1) operations per direction. With equal segments every input has
    arrived just when its turn comes, also from round to round, since rank 0 starts and ends every round
    (segments 0 and 2L are both its own).
    """
    for p in range(1, 7):
        for layers in (p, 2 * p, 3 * p):
            for fold in (1, 2, 3):
                for rounds in (1, 2):
                    for forward, backward in UNITS:
                        m = p * fold * rounds
                        plan = built("helix", p, layers, m, num_fold=fold)
                        expected = m * (2 * layers // p + 1) * (forward + backward)
                        timeline = simulate(plan, uniform_costs(plan, forward, backward)).timeline
                        assert timeline.makespan_ms == expected
                        assert timeline.busy_ms[0] == expected


# The definition of helix, apart from helixpipe.plan: (segment, kind, micro batch) per rank.


def helix_rank(p, fold, segment, i):
    layer, slot = segment // 2, i // fold % p
    return (layer + slot + 1) % p if segment % 2 else layer % p


def helix_order(rank, p, layers, fold, rounds):
    slots = [(2 * (rank - 1 - k) + 1, k) for k in range(rank - 1, -1, -1)]
    for layer in range(rank, layers + 1, p):
        slots += [(2 * layer, slot) for slot in range(p)]
        if layer < layers:
            slots += [(2 * (layer + k) + 1, p - 1 - k) for k in range(p) if layer + k < layers]
    order = []
    for start in range(0, p * fold * rounds, p * fold):
        forward = [(segment, start + slot * fold + j) for segment, slot in slots for j in range(fold)]
        order += [(segment, "F", i) for segment, i in forward]
        order += [(segment, "B", i) for segment, i in reversed(forward)]
    return order


def longest_path(p, layers, fold, rounds, duration, message):
    """End of every operation: after the one before it on its rank and after its input has arrived."""
    end_of_chain = 2 * layers
    before, inputs, ranks = {}, {}, {}
    for rank in range(p):
        order = helix_order(rank, p, layers, fold, rounds)
        before.update(zip(order[1:], order, strict=False))
        ranks.update(dict.fromkeys(order, rank))
    for segment, kind, i in ranks:
        if kind == "F" and segment > 0:
            inputs[segment, kind, i] = (segment - 1, "F", i)
        elif kind == "B":
            inputs[segment, kind, i] = (segment, "F", i) if segment == end_of_chain else (segment + 1, "B", i)
    graph = {op: {d[op] for d in (before, inputs) if op in d} for op in ranks}
    ends = {}
    for op in TopologicalSorter(graph).static_order():
        assert ranks[op] == helix_rank(p, fold, op[0], op[2])
        start = ends[before[op]] if op in before else 0
        if op in inputs:
            crosses = ranks[inputs[op]] != ranks[op]
            start = max(start, ends[inputs[op]] + message * crosses)
        ends[op] = start + duration(op)
    return ends


# Integers, so that sums are exact in floating point and equality means equality.
COSTS = st.fixed_dictionaries(
    {
        name: st.tuples(st.integers(1, 9), st.integers(1, 9))
        for name in ("first", "middle", "last", "attention")
    }
)


@settings(max_examples=60, deadline=None)
@given(
    p=st.integers(1, 5),
    layers_per_rank=st.integers(1, 2),
    fold=st.integers(1, 3),
    rounds=st.integers(1, 3),
    times=COSTS,
    message=st.just(0) | st.integers(1, 12),
)
def test_helix_equals_the_recurrence(p, layers_per_rank, fold, rounds, times, message):
    layers = p * layers_per_rank

    def duration(op):
        segment, kind, _ = op
        name = {0: "first", 2 * layers: "last"}.get(segment, "attention" if segment % 2 else "middle")
        return times[name]["FB".index(kind)]

    ends = longest_path(p, layers, fold, rounds, duration, message)
    plan = built("helix", p, layers, p * fold * rounds, num_fold=fold)
    names = set(plan.segment_names)
    costs = Costs({name: SegmentCost(*times[name]) for name in names}, {"*": message})
    timeline = simulate(plan, costs).timeline
    assert timeline.makespan_ms == max(ends.values())
    assert {
        (op.segment, op.kind.value, op.micro_batch): end for spans in timeline.spans for op, _, end in spans
    } == ends


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("fold", [1, 2, 3])
@pytest.mark.parametrize("p", [2, 3, 4, 6])
def test_folds_hide_messages(p, fold, rounds):
    """What messages add to uniform helix: nothing while fold - 1 segments last as long as a message.

    While a micro batch is on the wire, its rank computes the other fold - 1 of the slot. What is left
    over delays the next segment twice per layer (to the attention and from it) and in every round; with
    fold 1 that is the whole message. With p = 2 every slot has one of these messages instead of two
    (slot 0 has none after attention, slot p - 1 none before it).
    """
    forward, backward = 2, 3
    crossings = 1 if p == 2 else 2
    for message in range(8):
        left = max(0, message - (fold - 1) * forward) + max(0, message - (fold - 1) * backward)
        for layers in (p, 2 * p, 4 * p):
            plan = built("helix", p, layers, p * fold * rounds, num_fold=fold)
            added = makespan(plan, forward, backward, message) - makespan(plan, forward, backward)
            assert added == rounds * layers * crossings * left


def test_two_folds_hide_what_one_exposes():
    one, two = (built("helix", 4, 16, 8, num_fold=fold) for fold in (1, 2))
    assert makespan(one) == makespan(two)
    assert makespan(two, message=1) == makespan(two)
    assert makespan(one, message=1) == makespan(one) + 2 * 4 * 16  # 2 rounds x 4 messages per layer


def test_messages_posted_in_time_do_not_change_the_clock():
    """A lowered plan and its compute-only form then take the same time."""
    for schedule, options in [("1f1b", {}), ("interleaved", {}), ("helix", {})]:
        plan = built(schedule, 4, 8, 8, compute_only=False, **options)
        costs = Costs(uniform_costs(plan).segments, {"*": 0.5})
        assert simulate(plan, costs).timeline == simulate(plan.compute_only(), costs).timeline


@pytest.mark.parametrize(
    ("order", "start_ms"),
    [
        ("0RECV_F0@0 0F1 0F2 1F0 1F1 1F2", 6),
        ("0F1 0RECV_F0@0 0F2 1F0 1F1 1F2", 6),
        ("0F1 0F2 0RECV_F0@0 1F0 1F1 1F2", 8),
    ],
)
def test_a_message_leaves_once_its_receive_is_posted(order, start_ms):
    """It is ready at 3 and takes 2; each operation takes 3."""
    orders = ["0F0 0SEND_F0@1", order]
    plan = Plan(
        "by hand",
        2,
        3,
        ("a", "b"),
        ((0, 1, 1), (1, 1, 1)),
        tuple(tuple(Operation.parse(word) for word in words.split()) for words in orders),
    )
    costs = Costs(uniform_costs(plan, forward=3).segments, {"*": 2})
    timeline = simulate(plan, costs).timeline
    assert {span.operation: span.start_ms for span in timeline.spans[1]}[Operation(1, Kind.F, 0)] == start_ms
    assert timeline.waits[1] == (() if start_ms == 6 else (Span(Operation(0, Kind.RECV_F, 0, 0), 6, 8),))


def test_edges_have_their_own_times():
    plan = built("gpipe", 3, 3, 1)
    segments = uniform_costs(plan).segments
    named = Costs(segments, {"stage0->stage1": 5, "*": 1})
    assert simulate(plan, named).timeline.makespan_ms == 9 + 2 * (5 + 1)
    spans = simulate(plan, named).timeline.spans
    assert spans[1][0].start_ms == 1 + 5
    assert spans[2][0].start_ms == spans[1][0].end_ms + 1
    # The gradient of an edge takes as long as its activation.
    assert spans[0][1].start_ms == spans[1][1].end_ms + 5


def test_messages_within_a_rank_are_free():
    plan = built("helix", 1, 2, 2)
    assert makespan(plan, message=100) == makespan(plan)


def test_weight_gradients_take_their_own_time():
    whole = Plan("by hand", 1, 1, ("s",), ((0,),), (_ops("0F0 0B0"),))
    split = Plan("by hand", 1, 1, ("s",), ((0,),), (_ops("0F0 0B0 0W0"),))
    costs = Costs({"s": SegmentCost(1, 2, weight=4, bytes=8)}, {})
    assert simulate(whole, costs).timeline.spans == ((Span(*_ops("0F0"), 0, 1), Span(*_ops("0B0"), 1, 7)),)
    assert [span.end_ms for span in simulate(split, costs).timeline.spans[0]] == [1, 3, 7]
    assert simulate(split, costs).peak_bytes == [8]


def test_memory_of_one_f_one_b_falls_from_rank_to_rank():
    for p in (1, 2, 4, 8):
        plan = built("1f1b", p, p, 2 * p)
        costs = Costs({name: SegmentCost(1, 2, bytes=100) for name in plan.segment_names}, {})
        assert simulate(plan, costs).peak_bytes == [100 * (p - rank) for rank in range(p)]


def test_memory_of_helix_is_equal_but_for_the_ends():
    """A rank keeps fold x p micro batches of L/p parameter segments and fold of L attentions.

    Rank 0 holds the first and the last segment instead of one in the middle.
    """
    sizes = {"first": 3, "middle": 5, "last": 11, "attention": 7}
    for p, layers, fold, rounds in [(2, 4, 2, 1), (4, 8, 2, 3), (4, 4, 1, 2), (6, 12, 3, 1)]:
        plan = built("helix", p, layers, p * fold * rounds, num_fold=fold)
        costs = Costs({name: SegmentCost(1, 2, bytes=size) for name, size in sizes.items()}, {})
        inner = fold * (layers * sizes["middle"] + layers * sizes["attention"])
        ends = fold * p * (sizes["first"] + sizes["last"] - sizes["middle"])
        assert simulate(plan, costs).peak_bytes == [inner + ends] + [inner] * (p - 1)


def test_result_file():
    plan = built("1f1b", 2, 2, 2)
    result = json.loads(simulate(plan, uniform_costs(plan)).to_json())
    assert result == {
        "makespan_ms": 9,
        "busy_ms": [6, 6],
        "bubble_ratio": pytest.approx(1 / 3),
        "peak_bytes": [2, 1],
    }


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), COSTS)
def test_timelines_round_trip(p, fold, times):
    plan = built("helix", p, p, p * fold, num_fold=fold)
    costs = Costs({name: SegmentCost(*times[name]) for name in set(plan.segment_names)}, {"*": 0.5})
    timeline = simulate(plan, costs).timeline
    again = Timeline.from_json(timeline.to_json())
    assert again == timeline
    assert again.segment_names == plan.segment_names


def test_timelines_without_segment_names():
    timeline = Timeline(((Span(*_ops("1F0"), 0.0, 1.0),), ()), "measured, iteration 3")
    assert "segments" not in json.loads(timeline.to_json())
    assert Timeline.from_json(timeline.to_json()) == timeline
    assert not timeline.is_attention(*_ops("1F0"))


def test_empty_timelines_have_no_bubble():
    empty = Timeline(((), ()))
    assert (empty.makespan_ms, empty.busy_ms, empty.bubble_ratio) == (0, [0, 0], 0)


def test_time_is_counted_from_the_first_start():
    timeline = Timeline(((Span(*_ops("0F0"), 10.0, 12.0),), (Span(*_ops("1F0"), 12.5, 14.0),)))
    assert timeline.makespan_ms == 4
    assert timeline.bubble_ratio == 1 - 3.5 / 8


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        '{"ranks": []}',
        '{"source": "x", "ranks": [[["0F0", 1]]]}',
        '{"source": "x", "ranks": [[[5, 0, 1]]]}',
        '{"source": "x", "ranks": [[["0Q0", 0, 1]]]}',
        '{"source": "x", "ranks": [[["0F0", 2, 1]]]}',
        '{"source": "x", "ranks": [[["0F0", 0, NaN]]]}',
        '{"source": "x", "segments": ["s"], "ranks": [[["1F0", 0, 1]]]}',
    ],
)
def test_other_text_is_no_timeline(text):
    with pytest.raises(ValueError, match="not a timeline: ") as caught:
        Timeline.from_json(text)
    assert "\n" not in str(caught.value)


def costs_file(names, p2p=None, **changes):
    """costs.json for segments of ``names``, with ``changes`` made to the first."""
    segments = {name: {"F": 1, "B": 2} for name in names}
    segments[names[0]].update(changes)
    return json.dumps({"segments": segments, **({} if p2p is None else {"p2p_ms": p2p})})


TWO, THREE = ["stage0", "stage1"], ["stage0", "stage1", "stage2"]


def test_costs_file():
    plan = built("helix", 2, 2, 4)
    names = ["first", "attention", "middle", "last"]
    text = costs_file(names, {"first->attention": 3, "*": 0.5}, W=4, R=5, bytes=1024)
    costs = parse_costs(text, plan)
    assert costs.segments["first"] == SegmentCost(1, 2, weight=4, recompute=5, bytes=1024)
    assert costs.segments["last"] == SegmentCost(1, 2)
    assert costs.transfer_ms("first", "attention") == 3
    assert costs.transfer_ms("attention", "last") == 0.5
    assert costs.duration_ms(Kind.B, "first", splits_backward=False) == 6
    assert costs.duration_ms(Kind.B, "first", splits_backward=True) == 2
    assert costs.duration_ms(Kind.W, "first", splits_backward=True) == 4


def test_every_edge_by_name_needs_no_default():
    plan = built("1f1b", 3, 3, 2)
    costs = parse_costs(costs_file(THREE, {"stage0->stage1": 1, "stage1->stage2": 2}), plan)
    assert costs.transfer_ms("stage1", "stage2") == 2
    free = parse_costs(costs_file(THREE), plan)
    assert free.transfer_ms("stage1", "stage2") == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (costs_file(TWO[:1]), "segment 'stage1' is missing; needed: stage0, stage1"),
        (costs_file(["attention"]), "segment 'attention' is unknown; known: stage0, stage1"),
        ('{"p2p_ms": {}}', "key 'segments' is missing"),
        (
            '{"segments": {}, "p2p": {}}',
            "key 'p2p' is unknown; known: loan_bytes, message_bytes, network, p2p_ms, ranks, segments",
        ),
        (
            costs_file(TWO, {"stage1->stage0": 1}),
            "edge 'stage1->stage0' is unknown; known: *, stage0->stage1",
        ),
        (
            costs_file(TWO, G=1),
            "segment stage0: key 'G' is unknown; known: B, F, R, W, bytes, context_bytes, gradient_bytes",
        ),
        (costs_file(TWO, F=-1), "segment stage0: F must be a number that is not negative, found -1"),
        (costs_file(TWO, F="1"), "segment stage0: F must be a number"),
        (costs_file(TWO, F=True), "segment stage0: F must be a number"),
        (costs_file(TWO, F=float("nan")), "segment stage0: F must be a number"),
        (costs_file(TWO, {"*": -2}), "p2p_ms * must be a number that is not negative, found -2"),
        (
            costs_file(TWO, R=7, W=4),
            "segment stage0: R (7) is part of the backward pass B + W (6) and cannot exceed it",
        ),
        ('{"segments": []}', "segments must be an object"),
        ('{"segments": {"stage0": 3, "stage1": 3}}', "segment stage0 must be an object, found 3"),
        ("[]", "expected a JSON object"),
        ("{", "invalid JSON"),
    ],
)
def test_wrong_costs_name_the_place(text, message):
    with pytest.raises(ValueError, match=r"^costs: ") as caught:
        parse_costs(text, built("1f1b", 2, 2, 2))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_edge_without_a_time_is_an_error():
    with pytest.raises(ValueError, match="edge 'stage1->stage2' is missing"):
        parse_costs(costs_file(THREE, {"stage0->stage1": 1}), built("1f1b", 3, 3, 2))


def _ops(text):
    return tuple(Operation.parse(word) for word in text.split())


def test_a_plan_that_deadlocks_has_no_times():
    """It was not validated; half of a timeline would be taken for a whole one."""
    plan = build_plan(
        "1f1b", ScheduleRequest(num_layers=2, num_ranks=2, num_microbatches=2), compute_only=True
    )
    first, second = plan.orders
    with pytest.raises(ValueError, match="the plan deadlocks; validate it first"):
        simulate(replace(plan, orders=(first[::-1], second)), uniform_costs(plan, 1.0, 1.0, 1.0))
