"""Loans: which weights helix lends, when they travel, and that a plan with wrong loans is refused."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.plan import Kind, Loan, Operation, Plan, PlanError, ScheduleRequest, build_plan, validate
from helixpipe.plan.attention_range import AttentionSizes, cheapest_range, slot_bytes
from helixpipe.plan.deadlock import find_deadlock
from helixpipe.plan.lower import lower
from helixpipe.plan.simulation.costs import Costs, SegmentCost
from helixpipe.plan.simulation.simulate import simulate


def helix(p, layers, m, fold=2, attention_range="qkv", head_placement=None, **options):
    wanted = ScheduleRequest(
        num_ranks=p,
        num_layers=layers,
        num_microbatches=m,
        num_fold=fold,
        attention_range=attention_range,
        head_placement=head_placement,
    )
    return build_plan("helix", wanted, **options)


@st.composite
def plans(draw):
    p, fold, rounds = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    layers = p * draw(st.integers(1, 2))
    choices = [("qkv", None), ("block", "first"), ("core", "spread"), ("block", "spread")]
    return helix(p, layers, p * fold * rounds, fold, *draw(st.sampled_from(choices)))


def lent_segments(plan):
    attention = plan.parameters["attention_range"] != "core"
    spread = plan.parameters.get("head_placement") == "spread"
    last = plan.num_segments - 1
    return [s for s in range(plan.num_segments) if (s % 2 and attention) or (s == last and spread)]


@settings(max_examples=60, deadline=None)
@given(plans())
def test_each_layer_lends_once_per_round_to_every_other_rank(plan):
    p, fold = plan.num_ranks, plan.parameters["num_fold"]
    found = Counter((loan.segment, loan.micro_batches[0] // (p * fold)) for loan in plan.loans)
    rounds = range(plan.num_microbatches // (p * fold))
    expected = {(segment, number): p - 1 for segment in lent_segments(plan) for number in rounds}
    assert found == (expected if p > 1 else {})
    for loan in plan.loans:
        assert loan.owner == loan.segment // 2 % p
        assert {plan.rank_of(loan.segment, i) for i in loan.micro_batches} == {loan.borrower}
        assert len(loan.micro_batches) == fold
    # Whatever is not on loan runs where the weights are.
    lent = {(loan.segment, i) for loan in plan.loans for i in loan.micro_batches}
    for segment in lent_segments(plan):
        for i in range(plan.num_microbatches):
            is_at_home = plan.rank_of(segment, i) == segment // 2 % p
            assert is_at_home == ((segment, i) not in lent)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_plans_with_loans_round_trip_and_never_block(plan):
    assert Plan.from_json(plan.to_json()) == plan
    for variant in (plan, plan.forward_only()):
        validate(variant)
        assert not find_deadlock(variant, rendezvous=False)
        assert not find_deadlock(variant, rendezvous=True)
    kinds = Counter(op.kind for order in plan.orders for op in order)
    for kind in (Kind.SEND_P, Kind.RECV_P, Kind.SEND_G, Kind.RECV_G):
        assert kinds[kind] == len(plan.loans)
    evaluated = Counter(op.kind for order in plan.forward_only().orders for op in order)
    assert evaluated[Kind.SEND_P] == evaluated[Kind.RECV_P] == len(plan.loans)
    assert not evaluated[Kind.SEND_G] + evaluated[Kind.RECV_G]


@settings(max_examples=60, deadline=None)
@given(plans())
def test_weights_leave_with_the_input_and_gradients_with_the_last_backward(plan):
    for loan in plan.loans:
        first = Operation(loan.segment - 1, Kind.F, loan.micro_batches[0])
        feeder, message = loan.owner, loan.weights_sent
        if plan.rank_of(loan.segment - 1, first.micro_batch) != feeder:
            feeder, message = loan.borrower, loan.weights_received
        order = plan.orders[feeder]
        assert next(op for op in order[order.index(message) :] if op.kind.is_compute) == first
        borrower = plan.orders[loan.borrower]
        returned = borrower.index(loan.gradients_sent)
        before = [op for op in borrower[:returned] if op.kind.is_compute][-1]
        assert before == Operation(loan.segment, Kind.B, loan.micro_batches[0])
        # The result that a rank may be waiting for goes first.
        assert not any(
            op[:3] == (loan.segment - 1, Kind.SEND_B, loan.micro_batches[0]) for op in borrower[returned:]
        )


@pytest.mark.parametrize(("p", "fold"), [(2, 1), (4, 2), (8, 2)])
def test_a_spread_head_runs_where_the_slots_last_attention_was(p, fold):
    plan = helix(p, 2 * p, 2 * p * fold, fold, "core", "spread")
    last = plan.num_segments - 1
    assert plan.placement[last] == plan.placement[last - 1]
    for rank, order in enumerate(plan.compute_only().orders):
        heads = [op for op in order if op.segment == last and op.kind is Kind.F]
        # As many on each rank, and the turn from forward to backward is there.
        assert len(heads) == 2 * fold
        turn = order.index(heads[fold - 1])
        assert order[turn + 1] == heads[fold - 1]._replace(kind=Kind.B), rank
    paper = helix(p, 2 * p, 2 * p * fold, fold, "core", "first")
    assert paper == helix(p, 2 * p, 2 * p * fold, fold, "core")
    assert set(paper.placement[last]) == {0}


@pytest.mark.parametrize(("head_placement", "heads"), [("first", 16), ("spread", 2)])
def test_spreading_the_head_removes_the_serial_tail(head_placement, heads):
    """Where the head takes longest, the iteration grows by that of all micro batches, or of a slot's."""
    plan = helix(8, 8, 16, 2, "block", head_placement)

    def makespan_ms(head):
        one = SegmentCost(1, 2)
        costs = Costs(
            {"first": one, "attention": one, "middle": one, "last": SegmentCost(head, 2 * head)}, {}
        )
        return simulate(plan, costs).timeline.makespan_ms

    assert makespan_ms(10) - makespan_ms(4) == heads * 6 * (1 + 2)


def test_core_attention_lends_nothing():
    plan = helix(4, 8, 8, attention_range="core")
    assert plan.loans == ()
    assert "loans" not in json.loads(plan.to_json())


def test_only_the_loans_of_a_lowered_plan_have_messages():
    plan = helix(2, 2, 4, compute_only=True)
    assert plan.loans
    assert not plan.is_lowered
    validate(plan)
    assert lower(plan).is_lowered


PLAN = helix(3, 3, 6)
FIRST = PLAN.loans[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (FIRST._replace(segment=9), "impossible loan"),
        (FIRST._replace(micro_batches=()), "impossible loan"),
        (FIRST._replace(micro_batches=(0, 6)), "impossible loan"),
        (FIRST._replace(owner=3), "impossible loan"),
        (FIRST._replace(owner=FIRST.borrower), "impossible loan"),
        (FIRST._replace(micro_batches=(0, 0)), "lent twice"),
        (PLAN.loans[1], "lent twice"),
        (FIRST._replace(borrower=2), "lent to another rank than the placement names"),
        (FIRST._replace(micro_batches=(0, 4)), "lent to another rank than the placement names"),
    ],
)
def test_impossible_loans_are_refused(changed, message):
    with pytest.raises(PlanError, match=message):
        validate(replace(PLAN, loans=(changed, *PLAN.loans[1:])))


def test_loans_and_messages_must_agree():
    with pytest.raises(PlanError, match=r"1SEND_P0@1 is not needed here"):
        validate(replace(PLAN, loans=PLAN.loans[1:]))
    with pytest.raises(PlanError, match=r"1SEND_P0@1 is not needed here"):
        validate(replace(PLAN, loans=(FIRST._replace(owner=2), *PLAN.loans[1:])))
    without = PLAN.with_orders([op for op in order if op != FIRST.weights_sent] for order in PLAN.orders)
    with pytest.raises(PlanError, match="1SEND_P0@1 is missing from rank 0"):
        validate(without)


def moved(plan, rank, operation, index):
    orders = [list(order) for order in plan.orders]
    orders[rank].remove(operation)
    orders[rank].insert(index, operation)
    return plan.with_orders(orders)


def test_weights_must_arrive_before_the_loans_first_forward():
    index = PLAN.orders[FIRST.borrower].index(Operation(1, Kind.F, 0))
    with pytest.raises(PlanError, match=r"1F0 stands before its weights"):
        validate(moved(PLAN, FIRST.borrower, FIRST.weights_received, index))


@pytest.mark.parametrize("micro_batch", FIRST.micro_batches)
def test_gradients_must_not_leave_before_they_are_complete(micro_batch):
    index = PLAN.orders[FIRST.borrower].index(Operation(1, Kind.B, micro_batch))
    with pytest.raises(PlanError, match=r"1SEND_G0@0 stands before its gradients are complete"):
        validate(moved(PLAN, FIRST.borrower, FIRST.gradients_sent, index))


@pytest.mark.parametrize("entry", [1, {}, {"segment": 1}, FIRST._asdict() | {"owner": "0"}, [1, 0, 1, [0]]])
def test_a_damaged_loan_is_one_clear_error(entry):
    damaged = json.loads(PLAN.to_json()) | {"loans": [entry]}
    with pytest.raises(ValueError, match='not a plan: "loans" holds'):
        Plan.from_json(json.dumps(damaged))


def test_gradients_wait_for_weight_gradient_operations():
    """In a plan with W, the loan ends with the last of them; the owner goes on meanwhile."""
    orders = (
        "0F0 0F1 0B0 0B1 0W0 0W1".split(),
        "1F0 1F1 1B0 1B1 1W1 1W0".split(),
    )
    plan = Plan(
        "by hand",
        2,
        2,
        ("a", "b"),
        ((0, 0), (1, 1)),
        tuple(tuple(Operation.parse(word) for word in order) for order in orders),
        loans=(Loan(1, 0, 1, (0, 1)),),
    )
    lowered = lower(plan)
    validate(lowered)
    assert lowered.to_csv().splitlines() == [
        "1SEND_P0@1,0F0,0SEND_F0@1,0F1,0SEND_F1@1,0RECV_B0@1,0RECV_B1@1,0B0,1RECV_G0@1,0B1,0W0,0W1",
        "1RECV_P0@0,0RECV_F0@0,0RECV_F1@0,1F0,1F1,1B0,0SEND_B0@0,1B1,0SEND_B1@0,1W1,1W0,1SEND_G0@0",
    ]


def sizes(tokens, **changes):
    """Llama-7B's attention on one of 8 GPUs, in bf16."""
    found = {
        "tokens": tokens, "residual_tokens": tokens // 8, "hidden_size": 4096, "query_size": 512,
        "kv_size": 512, "element_bytes": 2, "gradient_bytes": 4,
    }  # fmt: skip
    return AttentionSizes(**(found | changes))


def test_messages_hold_what_travels():
    """In units of a GPU's share of a hidden state, and of a square matrix."""
    unit, matrix = 1024 * 512 * 2, 4096 * 512
    assert slot_bytes("core", sizes(1024), 1) == 2 * 6 * unit
    assert slot_bytes("qkv", sizes(1024), 1) == 2 * 3 * unit + 3 * matrix * (2 + 4)
    assert slot_bytes("block", sizes(1024), 3) == 2 * 3 * 2 * unit + 4 * matrix * (2 + 4)


@pytest.mark.parametrize(
    ("found", "fold", "expected"),
    [
        (sizes(2048), 2, "core"),
        (sizes(131072), 2, "block"),
        # 2 x 4 units for each micro batch against 4 matrices.
        (sizes(6144), 1, "core"),
        (sizes(6145), 1, "block"),
        (sizes(3073), 2, "block"),
    ],
)
def test_long_sequences_pay_for_weights(found, fold, expected):
    assert cheapest_range(found, fold) == expected
