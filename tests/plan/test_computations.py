"""Computations by number: the same plan, and what its computations wait for."""

from itertools import pairwise

import pytest

from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.plan.computations import NONE
from helixpipe.plan.operation import Kind, Operation, input_of, output_edge
from helixpipe.plan.simulation.costs import uniform_costs
from helixpipe.plan.simulation.simulate import simulate

SCHEDULES = {
    "1f1b": {},
    "zb-h1": {},
    "helix": {"attention_range": "block", "head_placement": "spread"},
    "seq1f1b": {"num_slices": 2},
    "sliced-helix": {"attention_range": "block"},
}


def built(schedule, *, compute_only=True):
    request = ScheduleRequest(num_layers=4, num_ranks=2, num_microbatches=4, **SCHEDULES[schedule])
    return build_plan(schedule, request, compute_only=compute_only)


@pytest.mark.parametrize("compute_only", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_numbers_say_what_operations_say(schedule, compute_only):
    plan = built(schedule, compute_only=compute_only)
    work = plan.computations
    for rank, (begin, end) in enumerate(pairwise(work.begins)):
        assert work.operations[begin:end] == tuple(op for op in plan.orders[rank] if op.kind.is_compute)
    for number, op in enumerate(work.operations):
        rank = work.rank_of(number)
        assert work.number(op) == number
        assert rank == plan.rank_of(op.segment, op.micro_batch)
        needed = input_of(op, plan.num_segments)
        assert work.inputs[number] == (NONE if needed is None else work.number(needed))
        splits = op.micro_batch in plan.split_micro_batches
        assert work.classes[work.class_of[number]] == (
            op.kind,
            plan.cost_name(op.segment, op.micro_batch),
            splits,
        )
        edge = output_edge(op, plan.num_segments)
        receiver = NONE if edge is None else plan.rank_of(edge[1], op.micro_batch)
        assert work.receivers[number] == receiver
        if receiver in (NONE, rank):
            assert work.edge_of[number] == NONE
        else:
            names = [plan.cost_name(segment, op.micro_batch) for segment in sorted(edge)]
            assert work.edges[work.edge_of[number]] == (*names, rank, receiver)
    assert work.counts.sum() == len(work.operations)


def test_what_completes_gradients_is_w_where_there_is_one():
    for schedule, kind in (("1f1b", Kind.B), ("zb-h1", Kind.W)):
        work = built(schedule).computations
        assert work.last_of(1, 2) == work.number(Operation(1, kind, 2))


def test_weights_and_keys_on_loan_are_needed_by_their_borrowers():
    plan = built("sliced-helix")
    wiring, work = plan.wiring, plan.computations
    assert len(wiring.loans) == len(plan.loans) > 0
    assert len(wiring.contexts) == 2 * len(plan.contexts) > 0
    for place, loan in enumerate(wiring.loans):
        content = wiring.first_loan + place
        users = {number for number in range(len(work.operations)) if content in wiring.needs(number)}
        assert users == {work.number(op) for op in loan.operations(Kind.F)}
        assert wiring.receivers[content] == loan.borrower
        assert wiring.receive_of(content) == loan.weights_received
    for place, message in enumerate(wiring.contexts):
        assert wiring.receivers[wiring.first_context + place] == message.receiver
        assert wiring.receive_of(wiring.first_context + place) == message.receive


def test_what_is_never_computed_is_waited_for_for_ever():
    plan = built("1f1b")
    first = Operation(0, Kind.F, 1)
    broken = plan.with_orders([[op for op in order if op != first] for order in plan.orders])
    with pytest.raises(ValueError, match="deadlocks"):
        simulate(broken, uniform_costs(broken))
