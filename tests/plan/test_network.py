"""Messages that queue for links, and what a simulation makes of them."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixpipe.plan import Kind, Operation, Plan, ScheduleRequest, build_plan
from helixpipe.plan.simulation.costs import (
    Costs,
    LoanBytes,
    RankCost,
    SegmentCost,
    parse_costs,
    uniform_costs,
)
from helixpipe.plan.simulation.memory import held_bytes, peak_bytes
from helixpipe.plan.simulation.network import Links, Network, busiest_link_ms
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.simulation.timeline import Level, Span, Timeline

MEGABYTE = 10**6  # takes 1 ms at 1 GB/s


def built(schedule, p, layers, m, **options):
    request = ScheduleRequest(num_ranks=p, num_layers=layers, num_microbatches=m, **options)
    return build_plan(schedule, request, compute_only=True)


def nodes(uplink=0.0):
    return Network(
        latency_ms=1, gb_per_s=4, ranks_per_node=2, node_latency_ms=2, node_gb_per_s=2, uplink_gb_per_s=uplink
    )


def test_a_message_takes_latency_and_its_bytes():
    links = Links(nodes())
    assert links.send(links.route(4 * MEGABYTE, 0, 1), 10) == 10 + 1 + 1
    assert links.send(links.route(4 * MEGABYTE, 1, 2), 10) == 10 + 2 + 2


def test_messages_between_two_ranks_go_one_after_the_other():
    links = Links(nodes())
    # Latency is no time on the wire: the second message follows when the first has left.
    assert [links.send(links.route(8 * MEGABYTE, 0, 1), 0) for _ in range(3)] == [1 + 2, 1 + 4, 1 + 6]
    assert links.send(links.route(8 * MEGABYTE, 1, 0), 0) == 1 + 2, "the other direction is another link"


def test_ranks_of_a_node_share_its_uplink():
    free, shared = Links(nodes()), Links(nodes(uplink=2))
    assert [free.send(free.route(2 * MEGABYTE, source, 2), 0) for source in (0, 1)] == [3, 3]
    assert [shared.send(shared.route(2 * MEGABYTE, source, 2), 0) for source in (0, 1)] == [3, 4]
    # Into a node as well: ranks 0 and 2 are in different nodes and send to rank 4's and 5's.
    into = Links(nodes(uplink=2))
    routes = [into.route(2 * MEGABYTE, source, target) for source, target in ((0, 4), (2, 5))]
    assert [into.send(route, 0) for route in routes] == [3, 4]
    within = Links(nodes(uplink=0.001))
    assert within.send(within.route(4 * MEGABYTE, 2, 3), 0) == 2, "no uplink within a node"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 9)), max_size=12))
def test_links_never_carry_two_messages_at_once(sends):
    links, busy = Links(nodes(uplink=2)), {}
    for ready, (source, target, size) in enumerate(sends):
        if source == target:
            continue
        arrival = links.send(links.route(size * MEGABYTE, source, target), ready)
        network = links.network
        latency = network.latency_ms if source // 2 == target // 2 else network.node_latency_ms
        end = arrival - latency
        start = end - (network.transfer_ms(size * MEGABYTE, source, target) - latency)
        assert start >= ready
        assert start >= busy.get((source, target), 0) - 1e-9
        busy[source, target] = end


@given(
    st.sampled_from([0.0, 2.0]),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9)), max_size=12),
)
def test_the_busiest_link_is_busy_for_the_sum_of_its_messages(uplink, sends):
    links, busy, num_bytes = Links(nodes(uplink)), Counter(), np.zeros((6, 6))
    for source, target, size in sends:
        if source != target:
            num_bytes[source, target] += size * MEGABYTE
            for link, milliseconds in links.route(size * MEGABYTE, source, target).busy_ms:
                busy[link] += milliseconds
    assert busiest_link_ms(links.network, num_bytes) == pytest.approx(max(busy.values(), default=0))


def test_an_unlimited_network_equals_free_messages():
    for schedule in ("gpipe", "1f1b", "interleaved", "helix"):
        plan = built(schedule, 4, 8, 8)
        segments = uniform_costs(plan).segments
        fast = Network(latency_ms=0, gb_per_s=1e12)
        timeline = simulate(plan, Costs(segments, {}, {"*": MEGABYTE}, fast)).timeline
        assert timeline.makespan_ms == pytest.approx(simulate(plan, Costs(segments, {})).timeline.makespan_ms)


def test_short_messages_equal_delays():
    """A message that is shorter than every operation never meets the one before it on its link."""
    for schedule in ("1f1b", "interleaved", "helix"):
        plan = built(schedule, 4, 8, 8)
        segments = uniform_costs(plan, 2, 4).segments
        network = Network(latency_ms=0, gb_per_s=1)
        linked = simulate(plan, Costs(segments, {}, {"*": 2 * MEGABYTE}, network)).timeline
        assert linked.spans == simulate(plan, Costs(segments, {"*": 2})).timeline.spans


def test_long_messages_queue():
    """GPipe's forwards leave one a millisecond and take five on the wire: the last rank gets one in five."""
    plan = built("gpipe", 2, 2, 4)
    segments = uniform_costs(plan, 1, 1).segments
    network = Network(latency_ms=0, gb_per_s=1)
    spans = simulate(plan, Costs(segments, {}, {"*": 5 * MEGABYTE}, network)).timeline.spans
    assert [span.start_ms for span in spans[1][:4]] == [6, 11, 16, 21]
    assert [s.start_ms for s in simulate(plan, Costs(segments, {"*": 5})).timeline.spans[1][:4]] == [
        6,
        7,
        8,
        9,
    ]


def test_ranks_that_carry_their_messages_compute_nothing_meanwhile():
    plan = built("gpipe", 2, 2, 2)
    segments = uniform_costs(plan, 10, 10).segments
    network = Network(latency_ms=1, gb_per_s=1, send_gb_per_s=0.5, receive_gb_per_s=0.25)
    spans = simulate(plan, Costs(segments, {}, {"*": MEGABYTE}, network)).timeline.spans
    # 2 ms to send before the next forward, 1 + 1 on the wire, 4 ms to receive before computing.
    assert [span.start_ms for span in spans[0][:2]] == [0, 12]
    assert [span.start_ms for span in spans[1][:2]] == [10 + 2 + 2 + 4, 18 + 10 + 4]
    assert all(span.end_ms - span.start_ms == 10 for rank in spans for span in rank), "compute is not longer"


def lending_plan():
    """One layer on two ranks, its attention's weights lent to rank 1 for the first micro batch."""
    return built("helix", 2, 2, 2, num_fold=1, attention_range="block")


def test_loans_travel_before_their_forward_and_back_after_their_backward():
    plan = lending_plan()
    first = plan.loans[0]
    assert (first.segment, first.owner, first.borrower) == (1, 0, 1)
    segments = uniform_costs(plan, 2, 2).segments
    network = Network(latency_ms=0, gb_per_s=1)
    sizes = {"attention": LoanBytes(5 * MEGABYTE, 7 * MEGABYTE)}
    ranks = (RankCost(), RankCost())
    found = simulate(plan, Costs(segments, {}, {"*": 0}, network, ranks, sizes))
    free = simulate(plan, Costs(segments, {}, {"*": 0}, network, ranks))
    starts = {span.operation: span.start_ms for rank in found.timeline.spans for span in rank}
    # The weights leave as the first forward starts, at 0, and take 5 ms; the forward itself takes 2.
    assert starts[Operation.parse("1F0")] == 5
    assert found.timeline.waits[1][0] == Span(Operation.parse("1RECV_P0@0"), 0.0, 5.0)
    assert found.timeline.makespan_ms > free.timeline.makespan_ms
    # Rank 0 has its last gradients 7 ms after rank 1's last backward of attention with its weights.
    ends = {span.operation: span.end_ms for rank in found.timeline.spans for span in rank}
    back = max(
        ends[Operation(loan.segment, Kind.B, loan.micro_batches[-1])] + 7
        for loan in plan.loans
        if loan.owner == 0
    )
    assert found.iteration_ms >= back
    assert simulate(plan, Costs(segments, {"*": 0}, loan_bytes=sizes)).timeline.spans == free.timeline.spans


def test_loans_of_other_segments_are_refused():
    text = json.dumps({**json.loads(uniform_costs(lending_plan()).to_json()), "loan_bytes": {"middle": {}}})
    with pytest.raises(ValueError, match=r"costs: loan of segment 'middle' is unknown; known: attention"):
        parse_costs(text, lending_plan())


def test_waits_name_their_message():
    plan = built("1f1b", 2, 2, 2)
    timeline = simulate(plan, Costs(uniform_costs(plan).segments, {"*": 0.5})).timeline
    assert timeline.waits[1][0] == Span(Operation.parse("0RECV_F0@0"), 0.0, 1.5)
    for rank, waits in enumerate(timeline.waits):
        busy_until = max(span.end_ms for span in timeline.spans[rank])
        idle = busy_until - timeline.busy_ms[rank]
        assert sum(end - start for _, start, end in waits) == pytest.approx(idle)


def test_the_iteration_ends_with_reduction_and_optimizer():
    plan = built("1f1b", 2, 2, 2)
    ranks = (
        RankCost(gradient_reduction_ms=1, optimizer_ms=2),
        RankCost(gradient_reduction_ms=9, optimizer_ms=1),
    )
    costs = Costs(uniform_costs(plan).segments, {}, ranks=ranks)
    found = simulate(plan, costs)
    # Rank 1 ends two milliseconds before rank 0 and reduces for nine; then the slowest optimizer.
    assert found.timeline.makespan_ms == 9
    assert [spans[-1].end_ms for spans in found.timeline.spans] == [9, 7]
    assert found.iteration_ms == 7 + 9 + 2
    assert json.loads(found.to_json())["iteration_ms"] == 18
    assert "iteration_ms" not in json.loads(simulate(plan, uniform_costs(plan)).to_json())


def memory_plan(text):
    order = tuple(Operation.parse(word) for word in text.split())
    return Plan("by hand", 1, 1 + max(op.micro_batch for op in order), ("s",), ((0, 0),), (order,))


def test_memory_over_time():
    plan = memory_plan("0F0 0F1 0B1 0B0")
    costs = Costs(
        {"s": SegmentCost(1, 2, bytes=10, workspace_bytes=3)}, {}, ranks=(RankCost(static_bytes=100),)
    )
    found = simulate(plan, costs)
    assert found.timeline.memory == (
        (
            Level(0, 100),
            *(Level(0, 113), Level(1, 110)),
            *(Level(1, 123), Level(2, 120)),
            *(Level(2, 123), Level(4, 110)),
            *(Level(4, 113), Level(6, 100)),
        ),
    )
    assert found.peak_bytes == peak_bytes(plan, costs) == [123]


def test_weight_gradients_may_need_more_than_was_kept():
    """With recomputation the inputs of matrix products come back in B and stay until W."""
    plan = memory_plan("0F0 0B0 0F1 0B1 0W0 0W1")
    costs = Costs({"s": SegmentCost(1, 1, 1, bytes=2, weight_bytes=7)}, {})
    assert [level.after for level in held_bytes(plan, costs, 0)] == [2, 7, 9, 14, 7, 0]
    assert peak_bytes(plan, costs) == [14]
    assert simulate(plan, costs).peak_bytes == [14]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "helix"])
def test_memory_curves_end_where_they_begin(schedule):
    plan = built(schedule, 4, 8, 8)
    segments = {
        name: SegmentCost(1, 1, 1, bytes=5 + n, weight_bytes=n, workspace_bytes=3)
        for n, name in enumerate(plan.cost_names)
    }
    costs = Costs(segments, {}, ranks=(RankCost(static_bytes=50),) * 4)
    found = simulate(plan, costs)
    for curve in found.timeline.memory:
        assert curve[0].bytes == curve[-1].bytes == 50
        assert [level.time_ms for level in curve] == sorted(level.time_ms for level in curve)
    assert found.peak_bytes == peak_bytes(plan, costs)


def test_costs_with_a_network_round_trip():
    plan = built("helix", 2, 2, 4)
    costs = Costs(
        {name: SegmentCost(1, 2, 0.5, 0.25, 10, 4, 2) for name in plan.cost_names},
        {},
        {"first->attention": 5, "*": 3},
        nodes(uplink=1),
        (RankCost(1, 2.0, 3.0), RankCost()),
    )
    assert parse_costs(costs.to_json(), plan) == costs
    lending = lending_plan()
    lent = replace(costs, message_bytes={"*": 3}, loan_bytes={"attention": LoanBytes(6, 7)})
    assert parse_costs(lent.to_json(), lending) == lent
    plain = uniform_costs(plan)
    assert parse_costs(plain.to_json(), plan) == plain


def test_timelines_keep_waits_and_memory():
    plan = built("1f1b", 3, 3, 4)
    timeline = simulate(plan, Costs(uniform_costs(plan).segments, {"*": 0.25})).timeline
    assert timeline.waits[2]
    assert Timeline.from_json(timeline.to_json()) == timeline


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"waits": [[]]}, "waits of 1 ranks, operations of 2"),
        ({"memory": [[], []]}, "a rank's memory has no level"),
        ({"waits": [[["0RECV_F0@0", 2, 1]], []]}, "0RECV_F0@0 on rank 0 runs from 2.0 to 1.0"),
        ({"memory": [[["x", 1]], [[0, 1]]]}, "could not convert"),
    ],
)
def test_wrong_waits_and_memory_are_no_timeline(change, message):
    text = json.dumps({"source": "x", "ranks": [[["0F0", 0, 1]], [["1F0", 1, 2]]], **change})
    with pytest.raises(ValueError, match="not a timeline: ") as caught:
        Timeline.from_json(text)
    assert message in str(caught.value)


NETWORK = {"latency_ms": 0.1, "gb_per_s": 10}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": NETWORK}, 'either "p2p_ms", or "network" and "message_bytes" together'),
        ({"message_bytes": {"*": 1}}, 'either "p2p_ms", or "network" and "message_bytes" together'),
        (
            {"network": NETWORK, "message_bytes": {"*": 1}, "p2p_ms": {"*": 1}},
            'either "p2p_ms", or "network" and "message_bytes" together',
        ),
        (
            {"network": {"gb_per_s": 1}, "message_bytes": {"*": 1}},
            "network: key 'latency_ms' is missing; needed: gb_per_s, latency_ms",
        ),
        (
            {"network": {**NETWORK, "gb_per_s": 0}, "message_bytes": {"*": 1}},
            "gb_per_s must be above 0, not 0",
        ),
        (
            {"network": {**NETWORK, "ranks_per_node": 2}, "message_bytes": {"*": 1}},
            "needs node_gb_per_s above 0",
        ),
        (
            {"network": {**NETWORK, "ranks_per_node": 1.5}, "message_bytes": {"*": 1}},
            "network: ranks_per_node must be a whole number, found 1.5",
        ),
        ({"network": NETWORK, "message_bytes": {"*": 0.5}}, "message_bytes * must be a whole number"),
        ({"ranks": [{}]}, "one entry for each of 2 ranks"),
        ({"ranks": [{}, {"static": 1}]}, "rank 1: key 'static' is unknown"),
        ({"ranks": [{}, {"static_bytes": -1}]}, "rank 1: static_bytes must be a number that is not negative"),
    ],
)
def test_wrong_network_and_ranks_name_the_place(change, message):
    segments = {name: {"F": 1, "B": 2} for name in ("stage0", "stage1")}
    with pytest.raises(ValueError, match=r"^costs: ") as caught:
        parse_costs(json.dumps({"segments": segments, **change}), built("1f1b", 2, 2, 2))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_costs_by_micro_batch():
    """Slices have names of their own, in segments and on edges."""
    plan = Plan(
        "by hand",
        2,
        2,
        ("a", "b"),
        ((0, 0), (1, 1)),
        (tuple(Operation(0, Kind.F, i) for i in range(2)), tuple(Operation(1, Kind.F, i) for i in range(2))),
        micro_batch_names=("long", "short"),
    )
    assert plan.cost_names == ("a/long", "a/short", "b/long", "b/short")
    times = {"a/long": 4, "a/short": 1, "b/long": 3, "b/short": 2}
    text = json.dumps(
        {
            "segments": {name: {"F": time, "B": 1} for name, time in times.items()},
            "p2p_ms": {"a/long->b/long": 1, "a/short->b/short": 10},
        }
    )
    spans = simulate(plan, parse_costs(text, plan)).timeline.spans
    assert [(s.start_ms, s.end_ms) for s in spans[0]] == [(0, 4), (4, 5)]
    assert [(s.start_ms, s.end_ms) for s in spans[1]] == [(5, 8), (15, 17)]
