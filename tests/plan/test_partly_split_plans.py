"""Plans with W for some micro batches: B of the others is the whole backward pass."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_plans import with_weight_gradients

from helixpipe.plan import Kind, Operation, Plan, PlanError, ScheduleRequest, build_plan, validate
from helixpipe.plan.lower import lower
from helixpipe.plan.plan import orders_from_csv
from helixpipe.plan.simulation.costs import Costs, SegmentCost
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.report.text import text_grid

BLOCK = ScheduleRequest(
    num_layers=4, num_ranks=2, num_microbatches=8, attention_range="block", head_placement="spread"
)


def partly_split(only=(4, 5, 6, 7), delay=3):
    return with_weight_gradients(build_plan("helix", BLOCK), delay, only)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 7)), st.integers(0, 6))
def test_any_choice_of_micro_batches_is_a_plan(only, delay):
    plan = partly_split(only, delay)
    assert plan.split_micro_batches == only
    assert plan.splits_backward == bool(only)
    assert [plan.last_kind(i) for i in range(8)] == [Kind.W if i in only else Kind.B for i in range(8)]
    assert Plan.from_json(plan.to_json()) == plan
    assert orders_from_csv(plan.to_csv()) == plan.orders
    evaluation = plan.forward_only()
    validate(evaluation)
    assert not evaluation.splits_backward


def test_loans_return_after_their_last_b_or_w():
    plan = partly_split()
    for loan in plan.loans:
        order = plan.orders[loan.borrower]
        last = max(order.index(op) for op in plan.completing(loan))
        assert order[last].kind is (Kind.W if loan.micro_batches[0] >= 4 else Kind.B)
        assert order.index(loan.gradients_sent) > last
        following = order[last + 1 : order.index(loan.gradients_sent)]
        assert not any(op.kind.is_compute for op in following), "it waits for nothing else"


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_weight_gradient_that_is_dropped_moved_or_doubled_is_noticed(data):
    plan = partly_split().compute_only()
    op = data.draw(st.sampled_from([op for order in plan.orders for op in order if op.kind is Kind.W]))
    home = plan.rank_of(op.segment, op.micro_batch)
    order = list(plan.orders[home])
    change = data.draw(st.sampled_from(["drop", "early", "double", "foreign", "whole"]))
    orders = list(plan.orders)
    if change == "drop":
        order.remove(op)
    elif change == "early":
        order.remove(op)
        order.insert(order.index(op._replace(kind=Kind.B)), op)
    elif change == "double":
        order.append(op)
    elif change == "foreign":
        order.remove(op)
        orders[1 - home] = (*orders[1 - home], op)
    else:
        # A W of a micro batch that has none elsewhere.
        order.append(Operation(op.segment, Kind.W, 0))
    orders[home] = tuple(order)
    with pytest.raises(PlanError, match="W"):
        validate(replace(plan, orders=tuple(orders)))


def test_gradients_that_return_before_the_last_w_are_noticed():
    plan = partly_split()
    loan = next(loan for loan in plan.loans if loan.micro_batches[0] >= 4)
    order = list(plan.orders[loan.borrower])
    order.remove(loan.gradients_sent)
    order.insert(max(order.index(op) for op in plan.completing(loan)), loan.gradients_sent)
    orders = [tuple(order) if rank == loan.borrower else old for rank, old in enumerate(plan.orders)]
    with pytest.raises(PlanError, match="stands before its gradients are complete"):
        validate(plan.with_orders(orders))


def by_hand(order):
    words = order.split()
    m = 1 + max(Operation.parse(word).micro_batch for word in words)
    return Plan("by hand", 1, m, ("s",), ((0,) * m,), (tuple(map(Operation.parse, words)),))


def test_times_and_bytes_of_both_kinds_of_backward():
    plan = by_hand("0F0 0F1 0B0 0B1 0W1")
    validate(plan)
    costs = Costs({"s": SegmentCost(10, 7, 5, bytes=100, weight_bytes=30)}, {})
    found = simulate(plan, costs)
    spans = [(str(op), start, end) for op, start, end in found.timeline.spans[0]]
    assert spans == [("0F0", 0, 10), ("0F1", 10, 20), ("0B0", 20, 32), ("0B1", 32, 39), ("0W1", 39, 44)]
    assert [level.bytes for level in found.timeline.memory[0]] == [
        0,
        100,
        100,
        200,
        200,
        200,
        100,
        100,
        30,
        30,
        0,
    ]
    assert peak_bytes(plan, costs) == [200]


def test_loans_reduce_after_the_last_weight_gradient():
    """The owner has the gradients back no earlier than the borrower's last B or W ends."""
    plan = partly_split()
    costs = Costs(dict.fromkeys(plan.cost_names, SegmentCost(1, 1, 1)), {})
    lowered_again = lower(plan.compute_only())
    assert lowered_again.orders == plan.orders
    assert sum(simulate(plan, costs).timeline.busy_ms) == 8 * 9 * 3


def test_the_text_drawing_shows_w():
    grid = text_grid(
        simulate(by_hand("0F0 0F1 0B0 0B1 0W1"), Costs({"s": SegmentCost(1, 1, 1)}, {})).timeline
    )
    assert "W1" in grid
    assert "W0" not in grid
