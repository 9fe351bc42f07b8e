"""Schedules with weight-gradient operations, on a chain and on a V: orders by hand, memory, bubbles."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.plan import Kind, ScheduleRequest, build_plan
from helixpipe.plan.simulation.costs import uniform_costs
from helixpipe.plan.simulation.memory import peak_activations
from helixpipe.plan.simulation.simulate import simulate

V_SHAPED = ("zb-v", "v-half", "v-min", "dualpipe-v")
SPLIT = ("zb-h1", *V_SHAPED)
SOME = settings(max_examples=40, deadline=None)
SIZES = st.integers(1, 16), st.integers(1, 40)


def built(schedule, p, m):
    request = ScheduleRequest(num_ranks=p, num_layers=2 * p, num_microbatches=m)
    return build_plan(schedule, request, compute_only=True)


def rows(schedule, p, m):
    return built(schedule, p, m).to_csv().splitlines()


def timeline(schedule, p, m, *times):
    plan = built(schedule, p, m)
    return simulate(plan, uniform_costs(plan, *times)).timeline


def test_zb_h1_order():
    assert rows("zb-h1", 3, 4) == [
        "0F0,0F1,0F2,0B0,0W0,0F3,0B1,0W1,0B2,0W2,0B3,0W3",
        "1F0,1F1,1B0,1F2,1B1,1W0,1F3,1B2,1W1,1B3,1W2,1W3",
        "2F0,2B0,2F1,2B1,2F2,2B2,2W0,2F3,2B3,2W1,2W2,2W3",
    ]


def test_zb_v_order():
    assert rows("zb-v", 2, 3) == [
        "0F0,0F1,0F2,3F0,3B0,3W0,3F1,3B1,3W1,0B0,0W0,3F2,3B2,3W2,0B1,0W1,0B2,0W2",
        "1F0,2F0,1F1,2F1,2B0,2W0,1F2,1B0,1W0,2F2,2B1,2W1,1B1,2B2,1B2,1W1,2W2,1W2",
    ]


def test_v_min_order():
    assert rows("v-min", 2, 2) == [
        "0F0,3F0,3B0,3W0,0F1,0B0,0W0,3F1,3B1,3W1,0B1,0W1",
        "1F0,2F0,2B0,1B0,1F1,2F1,2W0,1W0,2B1,1B1,2W1,1W1",
    ]


def test_v_half_order():
    assert rows("v-half", 3, 2)[0] == "0F0,0F1,5F0,5B0,5W0,5F1,5B1,0B0,5W1,0W0,0B1,0W1"


def test_dualpipe_v_order():
    assert rows("dualpipe-v", 2, 4) == [
        "0F0,0F1,0F2,3F0,3B0,3W0,3F1,0F3,3B1,3W1,3F2,0B0,0W0,3B2,3W2,3F3,0B1,0W1,3B3,3W3,0B2,0W2,0B3,0W3",
        "1F0,2F0,1F1,2F1,1F2,2B0,2W0,2F2,1B0,1W0,1F3,2B1,2W1,2F3,1B1,1W1,2B2,2W2,1B2,1W2,2B3,1B3,2W3,1W3",
    ]


@pytest.mark.parametrize("schedule", V_SHAPED)
@pytest.mark.parametrize("p", [1, 2, 5])
def test_v_placement(schedule, p):
    """Stages go down the ranks and come back up; only the turn stays on a rank."""
    plan = built(schedule, p, 3)
    assert [set(row) for row in plan.placement] == [{rank} for rank in [*range(p), *reversed(range(p))]]
    assert plan.segment_names == tuple(f"stage{s}" for s in range(2 * p))


@SOME
@given(st.sampled_from(SPLIT), *SIZES)
def test_micro_batches_keep_their_order(schedule, p, m):
    for order in built(schedule, p, m).orders:
        for segment, kind in {(op.segment, op.kind) for op in order}:
            passes = [op.micro_batch for op in order if (op.segment, op.kind) == (segment, kind)]
            assert passes == list(range(m))


def most_chunks(schedule, p):
    """What a rank may hold, in chunks of half a stage."""
    return {
        "zb-h1": 2 * p,
        "zb-v": 2 * p,
        "v-half": 2 * ((p + 2) // 2),
        "v-min": 2 * ((p + 4) // 3),
        "dualpipe-v": 2 * p + 1,
    }[schedule]


@SOME
@given(st.sampled_from(SPLIT), *SIZES)
def test_memory_is_bounded(schedule, p, m):
    chunks = 2 if schedule == "zb-h1" else 1
    peaks = peak_activations(built(schedule, p, m))
    assert max(peaks) * chunks <= most_chunks(schedule, p)
    if m >= 2 * p:
        assert max(peaks) * chunks == most_chunks(schedule, p)


@pytest.mark.parametrize("p", range(5, 17))
def test_memory_of_the_v_family_is_ordered(p):
    v_min, v_half, zb_v = (
        max(peak_activations(built(name, p, 2 * p))) for name in ("v-min", "v-half", "zb-v")
    )
    assert v_min <= v_half < zb_v
    assert v_min < v_half or p == 5  # 2 * 3 chunks both
    one_f_one_b = 2 * max(peak_activations(built("1f1b", p, 2 * p)))
    assert zb_v == one_f_one_b
    assert v_half <= one_f_one_b / 2 + 2
    assert v_min <= one_f_one_b / 3 + 8 / 3


@SOME
@given(p=st.integers(1, 12), extra=st.integers(0, 12))
def test_zb_v_has_no_bubble_with_equal_times(p, extra):
    """Every rank works without a pause; it starts after the ranks above it, and as much later it ends."""
    for rank, spans in enumerate(timeline("zb-v", p, max(1, 2 * p - 1) + extra, 1, 1, 1).spans):
        assert spans[0].start_ms == rank
        assert all(one.end_ms == two.start_ms for one, two in pairwise(spans))


@pytest.mark.parametrize("times", [(1, 1, 1), (10, 13, 7), (4, 6, 2)])
@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_bubbles_are_ordered(p, times):
    """In milliseconds of a chunk: a stage of 1F1B and ZB-H1 is two."""
    bubbles = []
    for schedule, chunks in (("1f1b", 2), ("zb-h1", 2), ("dualpipe-v", 1), ("zb-v", 1)):
        run = timeline(schedule, p, 2 * p, *times)
        bubbles.append(chunks * (run.makespan_ms - max(run.busy_ms)))
    one_f_one_b, zb_h1, dualpipe_v, zb_v = bubbles
    assert one_f_one_b > zb_h1 > dualpipe_v >= zb_v


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_dualpipe_v_pairs_a_forward_with_a_backward_of_the_other_chunk(p):
    """From the first pair on, every forward has a whole backward of the other chunk beside it."""
    m = 4 * p
    for rank, order in enumerate(built("dualpipe-v", p, m).orders):
        pairs = [
            (one.segment, two.segment)
            for one, two, three in zip(order, order[1:], order[2:], strict=False)
            if (one.kind, two.kind, three.kind) == (Kind.F, Kind.B, Kind.W)
            and two.segment == three.segment == 2 * p - 1 - one.segment
        ]
        first, second = (rank, 2 * p - 1 - rank), (2 * p - 1 - rank, rank)
        assert pairs.count(first) == m - 2 * p + rank + 1
        assert pairs.count(second) == m - p


@pytest.mark.parametrize("schedule", SPLIT)
def test_few_micro_batches(schedule):
    """Fewer than ranks are allowed, and take no longer than under 1F1B."""
    chunks = 2 if schedule == "zb-h1" else 1
    for m in range(1, 9):
        run, reference = timeline(schedule, 8, m, 1, 1, 1), timeline("1f1b", 8, m, 2, 2, 2)
        assert chunks * run.makespan_ms <= reference.makespan_ms
