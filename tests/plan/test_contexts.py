"""Contexts: keys and values that other ranks read, when they travel, and that wrong ones are refused."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.plan import Context, Kind, Operation, Plan, PlanError, ScheduleRequest, build_plan, validate
from helixpipe.plan.build import complete
from helixpipe.plan.context_lifetime import Content, holdings
from helixpipe.plan.deadlock import find_deadlock
from helixpipe.plan.device_model import DEVICE_MODELS, find_stall
from helixpipe.plan.lower import lower
from helixpipe.plan.plan import orders_from_csv
from helixpipe.plan.schedules.sliced_helix import SlicedRounds
from helixpipe.plan.simulation.costs import Costs, SegmentCost, parse_costs
from helixpipe.plan.simulation.memory import held_bytes, peak_bytes
from helixpipe.plan.simulation.network import Network
from helixpipe.plan.simulation.simulate import simulate


def sliced(p, layers, fold=1, m=1, **options):
    wanted = ScheduleRequest(num_ranks=p, num_layers=layers, num_microbatches=m, num_fold=fold, **options)
    return build_plan("sliced-helix", wanted)


def chained(**options):
    """Two rounds on 3 ranks; of their micro batches 1, 3 and 7 end one sequence and begin another.

    Slots hold up to three micro batches; the last slot of the second round holds none.
    """
    rounds = SlicedRounds(
        p=3,
        num_layers=3,
        rounds=(((0, 1, 2), (3, 4), (5,)), ((6,), (7, 8), ())),
        slices=((0, 1), (1, 2, 3), (3, 4, 5), (6, 7), (7, 8)),
        **{"attention_range": "core", "is_spread": True, **options},
    )
    return rounds.plan("by hand", {"num_layers": 3}, tuple(f"chunk{i}" for i in range(9)))


PLANS = [
    sliced(3, 3),
    sliced(4, 5, 2),
    sliced(4, 3, 2, 2, head_placement="spread", resend_context=True),
    sliced(3, 4, 2, attention_range="block", head_placement="spread"),
    sliced(3, 2, 2, attention_range="qkv", resend_context=True),
    complete(chained()),
    complete(chained(attention_range="block", is_spread=False)),
]
NEW_KINDS = (Kind.SEND_K, Kind.RECV_K, Kind.SEND_KB, Kind.RECV_KB, Kind.SEND_D, Kind.RECV_D)
MANY = settings(max_examples=60, deadline=None)


def refused(plan):
    with pytest.raises(PlanError) as caught:
        validate(plan)
    return str(caught.value)


def with_order(plan, rank, order):
    orders = [list(other) for other in plan.orders]
    orders[rank] = order
    return plan.with_orders(orders)


@st.composite
def places(draw, kinds=NEW_KINDS):
    """(plan, rank, index) of a message of a context."""
    kind = draw(st.sampled_from(kinds))
    plan = draw(st.sampled_from([p for p in PLANS if any(op.kind is kind for row in p.orders for op in row)]))
    found = [(r, i) for r, row in enumerate(plan.orders) for i, op in enumerate(row) if op.kind is kind]
    return plan, *draw(st.sampled_from(found))


@pytest.mark.parametrize("plan", PLANS)
def test_forms_round_trip(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert orders_from_csv(plan.to_csv()) == plan.orders
    assert plan.contexts
    assert plan.is_lowered
    assert not plan.compute_only().is_lowered


@pytest.mark.parametrize("plan", PLANS)
def test_each_message_of_a_context_travels_once(plan):
    kinds = Counter(op.kind for order in plan.orders for op in order)
    again = len(plan.contexts) if plan.parameters.get("resend_context") else 0
    counts = {Kind.SEND_K: len(plan.contexts), Kind.SEND_KB: again, Kind.SEND_D: len(plan.contexts)}
    for kind, count in counts.items():
        opposite = Operation(0, kind, 0, 0).counterpart(0).kind
        assert kinds[kind] == kinds[opposite] == count
    evaluated = plan.forward_only()
    validate(evaluated)
    kinds = Counter(op.kind for order in evaluated.orders for op in order)
    assert kinds[Kind.SEND_K] == len(plan.contexts)
    assert not kinds[Kind.SEND_KB] + kinds[Kind.SEND_D]


@pytest.mark.parametrize("plan", PLANS)
def test_messages_leave_as_their_last_producer_ends(plan):
    """Beside the activations of that instant: no computation stands between producer and send."""
    for rank, order in enumerate(plan.orders):
        for index, op in enumerate(order):
            if op.kind not in (Kind.SEND_K, Kind.SEND_D):
                continue
            message = next(m for m in plan.context_index.producers if m.sender == rank and m.send == op)
            last = next(other for other in reversed(order[:index]) if other.kind.is_compute)
            assert last in plan.context_index.producers[message]


@MANY
@given(places())
def test_drop(place):
    plan, rank, index = place
    order = list(plan.orders[rank])
    del order[index]
    refused(with_order(plan, rank, order))


@MANY
@given(places(), st.data())
def test_duplicate(place, data):
    plan, rank, index = place
    order = list(plan.orders[rank])
    order.insert(data.draw(st.integers(0, len(order))), order[index])
    refused(with_order(plan, rank, order))


@MANY
@given(places(), st.data())
def test_another_rank_peer_segment_micro_batch_or_kind(place, data):
    plan, rank, index = place
    orders = [list(order) for order in plan.orders]
    op = orders[rank].pop(index)
    what = data.draw(st.sampled_from(["rank", "peer", "segment", "micro_batch", "kind"]))
    if what == "rank":
        rank = data.draw(st.sampled_from([r for r in range(plan.num_ranks) if r != rank]))
    elif what == "kind":
        op = op._replace(
            kind=data.draw(st.sampled_from([k for k in Kind if k is not op.kind and not k.is_compute]))
        )
    else:
        sizes = {"peer": plan.num_ranks, "segment": plan.num_segments, "micro_batch": plan.num_microbatches}
        values = [value for value in range(sizes[what] + 1) if value != getattr(op, what)]
        op = op._replace(**{what: data.draw(st.sampled_from(values))})
    orders[rank].insert(index, op)
    refused(plan.with_orders(orders))


@MANY
@given(places(), st.data())
def test_misplace(place, data):
    """Before what it waits for, or behind what waits for it."""
    plan, rank, index = place
    order = list(plan.orders[rank])
    op = order.pop(index)
    context = plan.context_index
    message = next(
        m for m in context.producers if (rank, op) in ((m.sender, m.send), (m.receiver, m.receive))
    )
    if op.kind.is_send:
        last = max(order.index(other) for other in context.producers[message])
        order.insert(data.draw(st.integers(0, last)), op)
    else:
        waiting = [i for i, other in enumerate(order) if message in context.needed_by.get(other, ())]
        order.insert(data.draw(st.integers(min(waiting) + 1, len(order))), op)
    refused(with_order(plan, rank, order))


def test_keys_that_are_resent_too_early_are_refused():
    plan = PLANS[2]
    context = plan.contexts[0]
    again, first = context.keys_received_again, context.keys_received
    order = [op for op in plan.orders[context.borrower] if op != again]
    order.insert(order.index(first) + 1, again)
    assert "brings again what forwards are still to read" in refused(
        with_order(plan, context.borrower, order)
    )


def replaced(plan, **changes):
    """The plan with another first context, and messages made for it."""
    contexts = (plan.contexts[0]._replace(**changes), *plan.contexts[1:])
    return replace(plan.compute_only(), contexts=contexts)


FIRST = PLANS[1].contexts[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment": 0}, "impossible context"),
        ({"segment": 2}, "impossible context"),
        ({"segment": 99}, "impossible context"),
        ({"owner": FIRST.borrower}, "impossible context"),
        ({"owner": 9}, "impossible context"),
        ({"owner": 3}, "lent by another rank than makes them"),
        ({"borrower": 3}, "lent to another rank than reads them"),
        ({"lent": ()}, "impossible context"),
        ({"readers": ()}, "impossible context"),
        ({"lent": (1, 0)}, "impossible context"),
        ({"lent": (0, 2)}, "impossible context"),
        ({"lent": FIRST.readers, "readers": FIRST.lent}, "impossible context"),
        ({"readers": (2, 99)}, "impossible context"),
        ({"lent": (0,)}, "slice 2 reads the keys and values of slice 1 in segment 1: keep it"),
        ({"readers": (2,)}, "slice 3 reads the keys and values of slice 0 in segment 1: keep it"),
        ({"readers": (2, 3, 7)}, "lent to another rank than reads them"),
    ],
)
def test_wrong_contexts_are_refused(changes, message):
    assert message in refused(replaced(PLANS[1], **changes))


def test_keys_that_come_twice_are_refused():
    plan = PLANS[1].compute_only()
    assert "lent to one rank twice" in refused(replace(plan, contexts=(*plan.contexts, FIRST)))
    more = FIRST._replace(lent=(1,))
    assert "2 contexts bring them" in refused(replace(plan, contexts=(*plan.contexts, more)))
    # Rank 0 makes the keys and values of layer 0; the last slot attends there.
    validate(plan)
    assert {plan.rank_of(1, 6), plan.rank_of(0, 6)} == {0}
    # On rank 1 runs attention of slot 0, so slices of slot 0 are there already.
    home = FIRST._replace(borrower=1, readers=(1,), lent=(0,))
    assert "rank 1 has them" in refused(replace(plan, contexts=(*plan.contexts, home)))


@pytest.mark.parametrize("kind", [Kind.F, Kind.B])
def test_slices_on_one_rank_keep_their_order(kind):
    """The members of a slot attend in order on their rank, without a context."""
    plan = PLANS[1].compute_only()
    first, second = Operation(1, kind, 0), Operation(1, kind, 1)
    order = list(plan.orders[plan.rank_of(1, 0)])
    i, j = order.index(first), order.index(second)
    order[i], order[j] = order[j], order[i]
    assert "stands before" in refused(with_order(plan, plan.rank_of(1, 0), order))


def test_the_rank_that_makes_keys_reads_them_without_a_message():
    """The last slot attends where the keys and values are made: after their F, before their B."""
    plan = PLANS[1].compute_only()
    for first, second in (("0F4", "1F6"), ("1B7", "0B5")):
        ops = Operation.parse(first), Operation.parse(second)
        order = [op for op in plan.orders[0] if op != ops[1]]
        order.insert(order.index(ops[0]), ops[1])
        assert f"{ops[1]} stands before" in refused(with_order(plan, 0, order))


def test_contexts_of_files_are_checked():
    data = json.loads(PLANS[0].to_json())
    for entry in (
        7,
        {"segment": 1},
        {**data["contexts"][0], "lent": 0},
        {**data["contexts"][0], "is_resent": 1},
    ):
        with pytest.raises(ValueError, match='"contexts" holds'):
            Plan.from_json(json.dumps({**data, "contexts": [entry]}))


def test_a_plan_that_deadlocks_over_keys_is_refused():
    """Two ranks that each wait for the other's keys before they make their own."""
    by_hand = Plan(
        schedule="by hand",
        num_ranks=2,
        num_microbatches=4,
        segment_names=("first", "attention"),
        placement=((0, 1, 1, 0), (0, 1, 1, 0)),
        orders=(),
        micro_batch_names=("a", "b", "a", "b"),
        slices=((0, 1), (2, 3)),
        contexts=(Context(1, 0, 1, (0,), (1,)), Context(1, 1, 0, (2,), (3,))),
    )
    words = ("0F3 1F3 0F0 1F0", "0F1 1F1 0F2 1F2")
    orders = [[Operation.parse(word) for word in row.split()] for row in words]
    plan = by_hand.with_orders(orders)
    assert find_deadlock(plan, rendezvous=False) == {0: 1, 1: 1}
    assert "deadlock" in refused(plan)
    with pytest.raises(ValueError, match="can never run 1F3"):
        lower(plan)
    messages = (
        "0F3 1RECV_K2@1 1F3 0F0 1SEND_K0@1 1F0",
        "0F1 1RECV_K0@0 1F1 0F2 1SEND_K2@0 1F2",
    )
    lowered = by_hand.with_orders([Operation.parse(word) for word in row.split()] for row in messages)
    assert "deadlock" in refused(lowered)
    assert all(find_stall(lowered, model) for model in DEVICE_MODELS)


def three_ranks(**options):
    """One layer on 3 ranks, one slice a slot: slot 0 attends on rank 1, slot 1 on 2 and slot 2 on 0."""
    return sliced(3, 1, **options)


COSTS = Costs(
    {
        f"{name}/slice{i}": SegmentCost(1.0, 2.0, bytes=1000, context_bytes=10 + i, gradient_bytes=100 + i)
        for name in ("first", "attention", "last")
        for i in range(3)
    },
    {"*": 0.0},
)


def test_bytes_by_hand():
    plan = three_ranks()
    assert [str(op) for op in plan.orders[2]] == (
        "1RECV_K0@0 0RECV_F1@0 1F1 1SEND_F1@0 1RECV_B1@0 1B1 0SEND_B1@0 1SEND_D0@0".split()
    )
    # Slice 1 and the keys and values of slice 0; then the gradients of those, too.
    assert held_bytes(plan, COSTS, 2) == [(1010, 1010), (1110, 100)]
    assert peak_bytes(plan, COSTS)[1] == 1000, "slot 0 reads nothing"


def test_bytes_of_the_rank_that_makes_keys():
    """Slot 2 attends on rank 0, which keeps what slices 0 and 1 made there."""
    plan = three_ranks()
    held = dict(
        zip([str(op) for op in plan.orders[0] if op.kind.is_compute], held_bytes(plan, COSTS, 0), strict=True)
    )
    assert held["0F0"].after == 1000 + 10
    assert held["0F1"].after == 2000 + 10 + 11
    assert held["0F2"].after == 3000 + 10 + 11
    before = held["1B2"].during
    # The backward of the last slice adds to the gradients of the earlier ones, and ends the keys and values.
    assert held["1B2"].after == before - 1000 - 10 - 11
    assert held["0B0"].after == 0
    # From rank 2 comes what slice 1 adds to the gradient of slice 0.
    order = [str(op) for op in plan.orders[0]]
    assert order.index("1RECV_D0@2") < order.index("0B0")
    assert held["0B0"].during == 1000 + 100 + 10
    evaluated = plan.forward_only()
    assert held_bytes(evaluated, COSTS, 0)[-1].after == 0


def test_bytes_of_keys_that_are_lent_again():
    kept, again = three_ranks(), three_ranks(resend_context=True)
    assert [str(op) for op in again.orders[2]] == (
        "1RECV_K0@0 0RECV_F1@0 1F1 1SEND_F1@0 1RECV_KB0@0 1RECV_B1@0 1B1 0SEND_B1@0 1SEND_D0@0".split()
    )
    assert held_bytes(again, COSTS, 2) == [(1010, 1000), (1110, 100)]
    assert held_bytes(kept, COSTS, 2)[0].after == 1010


def test_messages_queue_behind_the_activations_of_their_instant():
    plan = three_ranks()
    edges = {"*": 1_000_000}
    costs = replace(COSTS, message_bytes=edges, p2p_ms={}, network=Network(latency_ms=0.0, gb_per_s=1.0))
    found = simulate(plan, costs)
    starts = {str(span.operation): span.start_ms for spans in found.timeline.spans for span in spans}
    # Slice 0 ends at 1; its keys reach rank 2 at 2, before slice 1 arrives there at 3.
    assert starts["1F1"] == 3.0
    slow = replace(costs, message_bytes={"*": 1_000_000, "context/slice0": 3_000_000})
    found = simulate(plan, slow)
    starts = {str(span.operation): span.start_ms for spans in found.timeline.spans for span in spans}
    # Keys until 4, and slice 1 waits for the link, which it shares with them, until 5.
    assert starts["1F1"] == 5.0


def test_a_reader_waits_for_its_keys():
    plan = three_ranks()
    costs = replace(COSTS, p2p_ms={"*": 0.0, "context/slice0": 10.0})
    found = simulate(plan, costs).timeline
    starts = {str(span.operation): span.start_ms for spans in found.spans for span in spans}
    assert starts["1F1"] == 11.0
    assert str(found.waits[2][0].operation) == "1RECV_K0@0"
    # Their gradients leave when 1B1 ends, and are waited for by 0B0.
    end = next(span.end_ms for span in found.spans[2] if str(span.operation) == "1B1")
    assert starts["0B0"] == end + 10.0


def test_keys_that_are_lent_again_after_their_own_backward_are_counted_until_then():
    plan = sliced(2, 5, 2, attention_range="qkv", resend_context=True)
    late = []
    for context in plan.contexts:
        order = plan.orders[context.owner]
        for i in context.lent:
            own = Operation(context.segment, Kind.B, i)
            if order.index(own) < order.index(context.keys_resent):
                late.append((context.owner, (i,), own, context.keys_resent))
    found = [
        (rank, held.micro_batches, held.start, held.end)
        for rank in range(2)
        for held in holdings(plan, rank)
        if held.content is Content.KEYS and held.start.kind is Kind.B
    ]
    assert sorted(found) == sorted(late)
    assert late


def test_costs_files_name_the_messages_of_keys_and_values():
    plan = three_ranks()
    data = json.loads(COSTS.to_json())
    data["p2p_ms"] = {"*": 1.0, "context/slice0": 2.0}
    assert parse_costs(json.dumps(data), plan).context_ms("context/slice0") == 2.0
    assert parse_costs(json.dumps(data), plan).segments["attention/slice1"].context_bytes == 11
    data["p2p_ms"] = {"*": 1.0, "context/slice7": 2.0}
    with pytest.raises(ValueError, match=r"edge 'context/slice7' is unknown; known: .*context/slice0"):
        parse_costs(json.dumps(data), plan)


def test_a_micro_batch_lends_to_the_sequence_that_it_begins_and_reads_of_the_one_that_it_ends():
    """Of the first layer: slot 0 makes keys for slot 1 alone, and slot 1's attend on rank 2."""
    found = [context for context in chained().contexts if context.segment == 1]
    assert found == [Context(1, 0, 2, (1, 2), (3,)), Context(1, 0, 2, (6,), (7,))]
    # Keys of 3 and 4 are read in slot 2, where they are made; those of 5, and of 8, nowhere.
    held = [(h.micro_batches, h.content) for h in holdings(complete(chained()), 0) if h.segment == 1]
    keys = [micro_batches for micro_batches, content in held if content is Content.KEYS]
    assert sorted(keys) == [(1,), (2,), (3,), (4,), (6,)], "each is held once, for one of its sequences"


def test_a_slice_that_two_sequences_share_keeps_its_order():
    """It comes after the slice whose keys it reads, and before the one that reads its own."""
    plan = chained()
    for first, second in (("1F0", "1F1"), ("1F3", "1F4"), ("1B2", "1B1"), ("0F3", "1F5"), ("1B5", "0B3")):
        ops = Operation.parse(first), Operation.parse(second)
        (rank,) = {plan.rank_of(op.segment, op.micro_batch) for op in ops}
        order = [op for op in plan.orders[rank] if op != ops[1]]
        order.insert(order.index(ops[0]), ops[1])
        assert "stands before" in refused(with_order(plan, rank, order))


@pytest.mark.parametrize(
    "slices",
    [
        ((0, 1, 2), (0, 3)),  # both go on from 0
        ((0, 1, 2), (1, 3)),  # 1 goes on, and begins another
        ((0, 2), (1, 2)),  # 2 ends both
        ((0, 1), (1,)),
        ((0,), (0,)),
        ((0, 1, 1),),
        ((0, 1), ()),
        ((0, 99),),
    ],
)
def test_micro_batches_of_more_sequences_than_can_be_told_apart_are_refused(slices):
    plan = replace(chained(), slices=slices, contexts=())
    assert "is a slice of two sequences, other than" in refused(plan)


def test_a_context_is_of_one_sequence():
    """0 is of another sequence than 2, though 1 is of both."""
    plan = chained()
    first = next(c for c in plan.contexts if c.segment == 3 and c.lent == (1, 2))
    others = tuple(context for context in plan.contexts if context != first)
    mixed = first._replace(lent=(0, 1, 2), readers=(3,))
    assert "impossible context" in refused(replace(plan, contexts=(mixed, *others)))
