"""Seq1F1B: slices, their order, and time and memory with slices that cost differently."""

import pytest

from helixpipe.plan import Operation, ScheduleRequest, build_plan
from helixpipe.plan.simulation.costs import Costs, SegmentCost
from helixpipe.plan.simulation.memory import peak_activations
from helixpipe.plan.simulation.simulate import simulate


def built(p, m, num_slices, schedule="seq1f1b", **options):
    request = ScheduleRequest(num_ranks=p, num_layers=p, num_microbatches=m, num_slices=num_slices)
    return build_plan(schedule, request, **options)


def test_order():
    plan = built(2, 2, 2, compute_only=True)
    assert plan.to_csv().splitlines() == [
        "0F0,0F1,0F2,0B1,0F3,0B0,0B3,0B2",
        "1F0,1F1,1B1,1F2,1B0,1F3,1B3,1B2",
    ]


def test_slices_and_their_names():
    plan = built(2, 3, 2)
    assert plan.num_microbatches == 6
    assert plan.slices == ((0, 1), (2, 3), (4, 5))
    assert plan.micro_batch_names == ("slice0", "slice1") * 3
    assert plan.cost_names == ("stage0/slice0", "stage0/slice1", "stage1/slice0", "stage1/slice1")


def test_one_slice_is_1f1b():
    for p, m in [(1, 1), (2, 3), (4, 8), (5, 2)]:
        assert built(p, m, 1).orders == built(p, m, None, schedule="1f1b").orders


@pytest.mark.parametrize("num_slices", [1, 2, 3, 5])
def test_makespan_and_memory(num_slices):
    """(m K + p - 1)(F + B): the last rank starts after p - 1 forwards and p - 1 backwards follow its end."""
    for p in (1, 2, 4, 7):
        for m in (1, 2, 5, 9):
            plan = built(p, m, num_slices)
            costs = Costs(dict.fromkeys(plan.cost_names, SegmentCost(3, 5, bytes=1)), {})
            assert simulate(plan, costs).timeline.makespan_ms == (m * num_slices + p - 1) * 8
            assert peak_activations(plan) == [
                min(m * num_slices, p - rank + num_slices - 1) for rank in range(p)
            ]


def test_slices_cost_what_their_names_say():
    """Rank 0 holds three slices before its first backward, rank 1 two: the long ones of two sequences."""
    plan = built(2, 2, 2, compute_only=True)
    sizes = {"slice0": SegmentCost(1, 2, bytes=7), "slice1": SegmentCost(1, 2, bytes=5)}
    costs = Costs({name: sizes[name.split("/")[1]] for name in plan.cost_names}, {})
    assert simulate(plan, costs).peak_bytes == [7 + 5 + 7, 7 + 7]


def test_slices_of_unequal_time_cost_more():
    equal, unequal = built(4, 4, 2), built(4, 4, 2)
    times = {"slice0": SegmentCost(2, 4), "slice1": SegmentCost(6, 12)}
    even = Costs(dict.fromkeys(equal.cost_names, SegmentCost(4, 8)), {})
    uneven = Costs({name: times[name.split("/")[1]] for name in unequal.cost_names}, {})
    assert simulate(unequal, uneven).timeline.makespan_ms > simulate(equal, even).timeline.makespan_ms


def test_backwards_of_a_sequence_run_in_reverse():
    plan = built(3, 3, 3, compute_only=True)
    for rank, order in enumerate(plan.orders):
        for first in (0, 3, 6):
            places = [order.index(Operation(rank, kind, i)) for kind in "FB" for i in range(first, first + 3)]
            assert places[:3] == sorted(places[:3])
            assert places[3:] == sorted(places[3:], reverse=True)
