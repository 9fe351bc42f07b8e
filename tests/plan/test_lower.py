"""Lowering: the messages that it adds, and that it changes nothing else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.plan import Kind, Operation, Plan, ScheduleRequest, build_plan, validate
from helixpipe.plan.lower import lower
from helixpipe.plan.simulation.costs import Costs, SegmentCost, uniform_costs
from helixpipe.plan.simulation.simulate import simulate


def compute_only(schedule, p, layers, m, **options):
    wanted = ScheduleRequest(num_ranks=p, num_layers=layers, num_microbatches=m, **options)
    return build_plan(schedule, wanted, compute_only=True)


@st.composite
def compute_plans(draw):
    schedule, p = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "helix"])), draw(st.integers(1, 6))
    if schedule == "helix":
        fold, rounds = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        layers = p * draw(st.integers(1, 2))
        return compute_only(schedule, p, layers, p * fold * rounds, num_fold=fold)
    if schedule == "interleaved":
        v = draw(st.integers(2, 3))
        return compute_only(schedule, p, p * v, p * draw(st.integers(1, 3)), virtual_stages=v)
    return compute_only(schedule, p, p, draw(st.integers(1, 10)))


@settings(max_examples=60, deadline=None)
@given(compute_plans())
def test_messages_follow_from_the_placement(plan):
    lowered = lower(plan)
    assert lowered.compute_only() == plan
    sent, received = {}, {}
    for rank, order in enumerate(lowered.orders):
        for op in order:
            name = (op.segment, op.kind.value[-1], op.micro_batch)
            if op.kind.is_send:
                sent.setdefault((rank, op.peer), []).append(name)
            elif op.kind.is_receive:
                received.setdefault((op.peer, rank), []).append(name)
    # Between every two ranks both ends name the same messages in the same order.
    assert sent == received
    needed = {
        (ends, (segment, direction, i))
        for segment in range(plan.num_segments - 1)
        for i in range(plan.num_microbatches)
        for here, there in [(plan.rank_of(segment, i), plan.rank_of(segment + 1, i))]
        if here != there
        for direction, ends in (("F", (here, there)), ("B", (there, here)))
    }
    found = [(pair, name) for pair, names in sent.items() for name in names]
    assert len(found) == len(needed)
    assert set(found) == needed


@settings(max_examples=60, deadline=None)
@given(compute_plans())
def test_a_send_follows_its_producer_at_once(plan):
    """Nothing is computed between a result and its message, so no message leaves late."""
    for order in lower(plan).orders:
        last = None
        for op in order:
            if op.kind.is_compute:
                last = op
            elif op.kind is Kind.SEND_F:
                assert last == Operation(op.segment, Kind.F, op.micro_batch)
            elif op.kind is Kind.SEND_B:
                assert last == Operation(op.segment + 1, Kind.B, op.micro_batch)


def test_lowered_text():
    plan = lower(compute_only("1f1b", 2, 2, 2))
    assert plan.to_csv().splitlines() == [
        "0F0,0SEND_F0@1,0F1,0SEND_F1@1,0RECV_B0@1,0B0,0RECV_B1@1,0B1",
        "0RECV_F0@0,0RECV_F1@0,1F0,1B0,0SEND_B0@0,1F1,1B1,0SEND_B1@0",
    ]


@settings(max_examples=60, deadline=None)
@given(compute_plans(), st.data())
def test_a_receive_is_posted_when_its_message_is_sent_if_costs_are_known(plan, data):
    """No message waits for its receive: with and without posts, the plan takes the same time."""
    time = st.integers(0, 12).map(lambda n: n / 4)
    costs = Costs(
        {name: SegmentCost(data.draw(time), data.draw(time)) for name in plan.cost_names},
        {"*": data.draw(time)},
    )
    assert simulate(lower(plan, costs), costs).timeline == simulate(plan, costs).timeline


@settings(max_examples=60, deadline=None)
@given(compute_plans())
def test_no_more_receives_wait_than_messages_can_be_sent_meanwhile(plan):
    """A receive that waits takes multiprocessors from computing: it is posted one operation ahead at most."""
    costs = uniform_costs(plan)
    lowered = lower(plan, costs)
    ends = {span.operation: span.end_ms for spans in simulate(plan, costs).timeline.spans for span in spans}
    for order in lowered.orders:
        for index, op in enumerate(order):
            if op.kind is Kind.RECV_F:
                sent_ms = ends[Operation(op.segment, Kind.F, op.micro_batch)]
                begun_ms = max(
                    (ends[before] for before in order[:index] if before.kind.is_compute), default=0
                )
                next_ms = min(
                    (ends[later] for later in order[index:] if later.kind.is_compute), default=sent_ms
                )
                assert begun_ms <= sent_ms < next_ms


def test_few_receives_wait_at_once():
    """Each that waits for its message holds multiprocessors."""
    schedules = (("gpipe", {}), ("1f1b", {}), ("zb-v", {}), ("helix", {"num_fold": 1}), ("helix", {}))
    for schedule, options in schedules:
        plan = lower(compute_only(schedule, 8, 16, 16, **options))
        nominal = dict.fromkeys(plan.cost_names, SegmentCost(1, 1, 1))
        timeline = simulate(plan, Costs(nominal, {"*": 0.5})).timeline
        ends = {span.operation: span.end_ms for spans in timeline.spans for span in spans}
        for order in plan.orders:
            posted_ms, waits = 0.0, []
            for op in order:
                if op.kind.is_compute:
                    posted_ms = ends[op]
                elif op.kind.is_receive:
                    step, kind = (0, Kind.F) if op.kind is Kind.RECV_F else (1, Kind.B)
                    waits.append((posted_ms, ends[Operation(op.segment + step, kind, op.micro_batch)]))
            most = max(sum(begin <= now < end for begin, end in waits) for now, _ in waits)
            assert most <= 3, schedule


def test_one_rank_needs_no_messages():
    plan = compute_only("helix", 1, 3, 4)
    assert lower(plan) == plan
    assert plan.is_lowered


def test_weight_gradients_are_kept_in_place():
    orders = [["0F0", "0B0", "0W0"], ["1F0", "1B0", "1W0"]]
    plan = Plan("by hand", 2, 1, ("a", "b"), ((0,), (1,)), _parsed(orders))
    lowered = lower(plan)
    validate(lowered)
    assert lowered.to_csv().splitlines() == [
        "0F0,0SEND_F0@1,0RECV_B0@1,0B0,0W0",
        "0RECV_F0@0,1F0,1B0,0SEND_B0@0,1W0",
    ]


def test_an_order_that_cannot_run_is_refused():
    plan = Plan("by hand", 2, 1, ("a", "b"), ((0,), (1,)), _parsed([["0B0", "0F0"], ["1F0", "1B0"]]))
    with pytest.raises(ValueError, match="rank 0 can never run 0B0: its input is never produced"):
        lower(plan)


def _parsed(orders):
    return tuple(tuple(Operation.parse(word) for word in order) for order in orders)
