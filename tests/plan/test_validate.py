"""Validation: every way to break a plan that we know of must be caught."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.plan import Kind, Operation, Plan, PlanError, ScheduleRequest, build_plan, validate
from helixpipe.plan.deadlock import find_deadlock
from helixpipe.plan.simulation.costs import Costs, SegmentCost
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.plan.validate import check_memory


def built(schedule, p, layers, m, **options):
    wanted = ScheduleRequest(num_ranks=p, num_layers=layers, num_microbatches=m, **options)
    return build_plan(schedule, wanted)


PLANS = [
    built("gpipe", 3, 3, 3),
    built("1f1b", 4, 4, 5),
    built("interleaved", 2, 4, 4, virtual_stages=2),
    built("helix", 2, 2, 4, num_fold=2),
    built("helix", 3, 3, 6, num_fold=1),
    built("helix", 4, 8, 8, num_fold=2),
    built("helix", 2, 4, 8, num_fold=2, attention_range="qkv"),
    built("helix", 3, 3, 6, num_fold=2, attention_range="block", head_placement="spread"),
]
MANY = settings(max_examples=150, deadline=None)


def spoilt(plan, rank, order):
    """``plan`` with another order on one rank, which validation must refuse."""
    orders = [list(other) for other in plan.orders]
    orders[rank] = order
    refused(plan.with_orders(orders))


def refused(plan):
    with pytest.raises(PlanError) as caught:
        validate(plan)
    return str(caught.value)


@st.composite
def places(draw, wanted=lambda op: True):
    """(plan, rank, index) of an operation."""
    plan = draw(st.sampled_from(PLANS))
    rank = draw(st.integers(0, plan.num_ranks - 1))
    index = draw(st.sampled_from([i for i, op in enumerate(plan.orders[rank]) if wanted(op)]))
    return plan, rank, index


def is_message(op):
    return not op.kind.is_compute


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.schedule}-{plan.num_ranks}")
def test_the_plans_that_are_broken_below_are_valid(plan):
    validate(plan)


@MANY
@given(places())
def test_drop(place):
    plan, rank, index = place
    order = list(plan.orders[rank])
    del order[index]
    spoilt(plan, rank, order)


@MANY
@given(places(), st.data())
def test_duplicate(place, data):
    plan, rank, index = place
    order = list(plan.orders[rank])
    order.insert(data.draw(st.integers(0, len(order))), order[index])
    spoilt(plan, rank, order)


@MANY
@given(places(), st.data())
def test_misplace(place, data):
    """An operation on another rank, at the same index."""
    plan, rank, index = place
    other = data.draw(st.sampled_from([r for r in range(plan.num_ranks) if r != rank]))
    orders = [list(order) for order in plan.orders]
    orders[other].insert(index, orders[rank].pop(index))
    refused(plan.with_orders(orders))


@MANY
@given(places(is_message), st.data())
def test_change_peer(place, data):
    plan, rank, index = place
    order = list(plan.orders[rank])
    peers = [peer for peer in range(plan.num_ranks + 1) if peer != order[index].peer]
    order[index] = order[index]._replace(peer=data.draw(st.sampled_from(peers)))
    spoilt(plan, rank, order)


@MANY
@given(places(), st.data())
def test_change_micro_batch(place, data):
    plan, rank, index = place
    order = list(plan.orders[rank])
    others = [i for i in range(plan.num_microbatches + 1) if i != order[index].micro_batch]
    order[index] = order[index]._replace(micro_batch=data.draw(st.sampled_from(others)))
    spoilt(plan, rank, order)


@MANY
@given(places(), st.data())
def test_change_segment(place, data):
    plan, rank, index = place
    order = list(plan.orders[rank])
    others = [s for s in range(plan.num_segments + 1) if s != order[index].segment]
    order[index] = order[index]._replace(segment=data.draw(st.sampled_from(others)))
    spoilt(plan, rank, order)


@MANY
@given(places(), st.data())
def test_change_kind(place, data):
    plan, rank, index = place
    order = list(plan.orders[rank])
    kinds = [
        kind
        for kind in Kind
        if kind is not order[index].kind and kind.is_compute == order[index].kind.is_compute
    ]
    order[index] = order[index]._replace(kind=data.draw(st.sampled_from(kinds)))
    spoilt(plan, rank, order)


@MANY
@given(places(lambda op: op.kind.is_receive), st.data())
def test_retarget_a_receive(place, data):
    """A receive of another message that the same rank really gets, from its right sender."""
    plan, rank, index = place
    order = list(plan.orders[rank])
    others = [op for op in order if op.kind.is_receive and op != order[index]]
    order[index] = data.draw(st.sampled_from(others))
    spoilt(plan, rank, order)


def swap(order, first, second):
    order = list(order)
    order[first], order[second] = order[second], order[first]
    return order


@MANY
@given(places(lambda op: op.kind.is_compute), st.data())
def test_swap_dependent_compute(place, data):
    """All computation of one micro batch is a chain, so no two of its operations may change places."""
    plan, rank, index = place
    order = plan.orders[rank]
    chain = [
        i
        for i, op in enumerate(order)
        if op.kind.is_compute and op.micro_batch == order[index].micro_batch and i != index
    ]
    spoilt(plan, rank, swap(order, index, data.draw(st.sampled_from(chain))))


@MANY
@given(st.data())
def test_swap_messages_on_one_channel(data):
    """Two messages to, or from, the same peer: the other end expects them in their old order."""
    plan = data.draw(st.sampled_from(PLANS))
    rank = data.draw(st.integers(0, plan.num_ranks - 1))
    messages = [(i, op) for i, op in enumerate(plan.orders[rank]) if is_message(op)]
    pairs = [
        (i, j)
        for (i, a), (j, b) in combinations(messages, 2)
        if a.peer == b.peer and a.kind.is_send == b.kind.is_send
    ]
    spoilt(plan, rank, swap(plan.orders[rank], *data.draw(st.sampled_from(pairs))))


@MANY
@given(places(lambda op: is_message(op) and op.kind not in (Kind.SEND_P, Kind.RECV_G)))
def test_swap_a_message_with_its_computation(place):
    """A send before the result exists, or a receive after its value is used."""
    plan, rank, index = place
    order, op = plan.orders[rank], plan.orders[rank][index]
    kind = Kind.F if op.kind in (Kind.SEND_F, Kind.RECV_F, Kind.RECV_P) else Kind.B
    # A loan begins and ends with the micro batch that names it: backward is the reverse of forward.
    # SEND_F and RECV_B stand beside the edge's first segment, the other two beside its second.
    segment = op.segment + (op.kind in (Kind.RECV_F, Kind.SEND_B))
    spoilt(plan, rank, swap(order, index, order.index(Operation(segment, kind, op.micro_batch))))


def by_hand(placement, *orders, num_microbatches=None):
    rows = [tuple(row) for row in placement]
    return Plan(
        schedule="by hand",
        num_ranks=len(orders),
        num_microbatches=len(rows[0]) if num_microbatches is None else num_microbatches,
        segment_names=tuple(f"s{i}" for i in range(len(rows))),
        placement=tuple(rows),
        orders=tuple(tuple(Operation.parse(word) for word in order.split()) for order in orders),
    )


# Micro batch 0 goes from rank 0 to rank 1, micro batch 1 the other way.
CROSSING = [(0, 1), (1, 0)]


def test_deadlock_only_when_sends_wait():
    """Both ranks send before they receive: buffers hide it, blocking sends hang."""
    plan = by_hand(
        CROSSING,
        "0F0 0SEND_F0@1 0RECV_F1@1 1F1",
        "0F1 0SEND_F1@0 0RECV_F0@0 1F0",
    )
    assert find_deadlock(plan, rendezvous=False) == {}
    assert find_deadlock(plan, rendezvous=True) == {0: 1, 1: 1}
    assert refused(plan) == (
        "deadlock when sends wait for their receives (on GPUs: one hardware queue "
        "(CUDA_DEVICE_MAX_CONNECTIONS=1); connections made at the first message):\n"
        "  rank 0: 0F0 0SEND_F0@1 <-- here 0RECV_F1@1 1F1\n"
        "  rank 1: 0F1 0SEND_F1@0 <-- here 0RECV_F0@0 1F0"
    )
    # One rank gives way: the same messages pass under both models.
    validate(by_hand(CROSSING, "0F0 0SEND_F0@1 0RECV_F1@1 1F1", "0F1 0RECV_F0@0 0SEND_F1@0 1F0"))


def test_deadlock_under_both_models():
    """Both ranks wait for the other's result before they make their own."""
    plan = by_hand(
        CROSSING,
        "0RECV_F1@1 1F1 0F0 0SEND_F0@1",
        "0RECV_F0@0 1F0 0F1 0SEND_F1@0",
    )
    for rendezvous in (False, True):
        assert find_deadlock(plan, rendezvous=rendezvous) == {0: 0, 1: 0}
    assert refused(plan).startswith("deadlock with buffered sends:\n  rank 0: 0RECV_F1@1 <-- here 1F1")


def test_deadlock_shows_only_the_ranks_that_hang():
    plan = by_hand([(0, 1, 2), (1, 0, 2)], "1F1 0F0", "1F0 0F1", "0F2 1F2")
    assert find_deadlock(plan, rendezvous=False) == {0: 0, 1: 0}
    assert refused(plan) == (
        "deadlock with buffered sends:\n  rank 0: 1F1 <-- here 0F0\n  rank 1: 1F0 <-- here 0F1"
    )


def test_long_orders_are_shown_around_the_place():
    plan = by_hand([(0,) * 12], " ".join(f"0F{i}" for i in [*range(8), 3, *range(8, 12)]))
    assert refused(plan) == (
        "0F3 is run twice:\n  rank 0: ... 0F4 0F5 0F6 0F7 0F3 <-- here 0F8 0F9 0F10 0F11"
    )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (by_hand([(0,)], "0F0", num_microbatches=2), "segment 0 is placed for 1 of 2 micro batches"),
        (by_hand([(1,)], "0F0"), "segment 0 is placed on a rank outside 0..0"),
        (by_hand([(0,)], "1F0"), "no such segment or micro batch"),
        (by_hand([(0,)], "0F0 0F1"), "no such segment or micro batch"),
        (by_hand([(0,)], "0F0 0SEND_F0@0"), "impossible peer"),
        (by_hand([(0,)], "0B0 0F0"), "0B0 stands before its F:\n  rank 0: 0B0 <-- here 0F0"),
        (by_hand([(0,)], "0F0 0W0 0B0"), "0W0 stands before its B"),
        (by_hand([(0,), (0,)], "0F0 1F0 1B0 0B0 1W0"), "0W0 is missing from rank 0"),
        (by_hand([(0, 0)], "0F0 0F1 0B0"), "0B1 is missing from rank 0"),
        (by_hand([(0,)], ""), "0F0 is missing from rank 0"),
        (by_hand([(0,), (1,)], "0F0 1F0", ""), "1F0 belongs to rank 1"),
        (by_hand([(0,), (1,)], "0SEND_F0@1 0F0", "0RECV_F0@0 1F0"), "0SEND_F0@1 stands before its producer"),
        (by_hand([(0,), (1,)], "0F0 0SEND_F0@1", "1F0 0RECV_F0@0"), "1F0 stands before its receive"),
        (by_hand([(0,), (1,)], "0F0 0SEND_F0@1", "1F0"), "0RECV_F0@0 is missing from rank 1"),
        (
            by_hand(
                [(0, 0), (1, 1)],
                "0F0 0SEND_F0@1 0F1 0SEND_F1@1",
                "0RECV_F1@0 0RECV_F0@0 1F0 1F1",
            ),
            "rank 0 sends 0SEND_F0@1 first, but rank 1 takes:\n  rank 1: 0RECV_F1@0 <-- here",
        ),
    ],
)
def test_rules(plan, message):
    assert message in refused(plan)


def test_shapes_must_agree():
    plan = built("1f1b", 2, 2, 2)
    assert refused(plan.with_orders(plan.orders[:1])) == "2 ranks but 1 orders"
    short = Plan("by hand", 2, 2, plan.segment_names, plan.placement[:1], plan.orders)
    assert refused(short) == "2 segments but 1 placed"


def test_split_backward_is_valid_in_any_possible_order():
    validate(by_hand([(0, 0)], "0F0 0F1 0B0 0B1 0W1 0W0"))


def test_memory_limit_is_inclusive():
    plan = built("1f1b", 4, 4, 8)
    costs = keeping(stage0=5, stage1=7, stage2=11, stage3=13)
    assert peak_bytes(plan, costs) == [20, 21, 22, 13]
    check_memory(plan, costs, 22)
    with pytest.raises(PlanError, match="rank 2 holds 22 bytes at its peak, 1 over the limit of 21"):
        check_memory(plan, costs, 21)


def test_memory_lives_until_the_weight_gradient():
    plan = by_hand([(0, 0)], "0F0 0B0 0F1 0W0 0B1 0W1")
    assert peak_bytes(plan, keeping(s0=3)) == [6]
    assert peak_bytes(by_hand([(0, 0)], "0F0 0B0 0F1 0B1"), keeping(s0=3)) == [3]
    assert peak_bytes(by_hand([(0, 0)], "0F0 0F1"), keeping(s0=3)) == [3], "evaluation keeps nothing"


def keeping(**bytes_of_segment):
    return Costs({name: SegmentCost(1, 1, bytes=size) for name, size in bytes_of_segment.items()}, {})


def test_weight_gradients_without_input_gradients_are_refused():
    order = (Operation(0, Kind.F, 0), Operation(0, Kind.W, 0))
    with pytest.raises(PlanError, match="stands before its B"):
        validate(Plan("x", 1, 1, ("s0",), ((0,),), (order,)))


def test_an_empty_plan_is_refused():
    with pytest.raises(PlanError, match="at least one rank"):
        validate(Plan("x", 0, 0, (), (), ()))
