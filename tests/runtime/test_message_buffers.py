"""Buffers of messages: the plan counts what the communicator holds, on every rank, at every operation."""

from dataclasses import replace

import pytest
from counting import held_while_running
from split_plans import with_weight_gradients
from test_executor import plan_of
from threads import run_on_threads
from toy_segments import ROWS, SplitToySegments, ToySegments, make_executor

from helixpipe.plan.simulation.costs import Costs, LoanBytes, SegmentCost
from helixpipe.plan.simulation.message_buffers import UnfinishedSends, buffer_bytes
from helixpipe.runtime.communicator import InMemoryFabric
from helixpipe.runtime.message import MessageLayout

WIDTH = 4
MESSAGE, WEIGHTS = 8 * ROWS * (WIDTH + 1), 8 * WIDTH * WIDTH


def even(kind):
    """Segments of one width, so that all messages are of one size."""
    return type(kind.__name__, (kind,), {"_width": staticmethod(lambda edge: WIDTH)})


def segments_of(plan):
    kind = even(SplitToySegments if plan.splits_backward else ToySegments)
    return lambda: kind(plan.num_segments)


def costs_of(plan, message=MESSAGE):
    lent = {plan.segment_names[loan.segment] for loan in plan.loans}
    return Costs(
        dict.fromkeys(plan.cost_names, SegmentCost(1, 2)),
        {},
        {"*": message},
        loan_bytes=dict.fromkeys(lent, LoanBytes(WEIGHTS, WEIGHTS)),
    )


PLANS = [
    *(
        plan_of("helix", p, p, 2 * p * rounds, attention_range=cut, head_placement=head)
        for p, rounds in ((2, 2), (3, 1), (4, 1))
        for cut in ("core", "qkv", "block")
        for head in ("first", "spread")
    ),
    *(plan_of(name, p, p, 3 * p) for name in ("1f1b", "gpipe", "zb-h1") for p in (2, 4)),
    with_weight_gradients(plan_of("helix", 3, 3, 6), delay=2),
    plan_of("helix", 3, 3, 6).forward_only(),
]
NAMES = [f"{plan.schedule}-p{plan.num_ranks}-{number}" for number, plan in enumerate(PLANS)]


@pytest.mark.parametrize("limit", [UnfinishedSends.max_bytes, 3 * MESSAGE], ids=["by number", "by bytes"])
@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
def test_the_plan_counts_what_the_communicator_holds(plan, limit, monkeypatch):
    monkeypatch.setattr(UnfinishedSends, "max_bytes", limit)
    counted = [buffer_bytes(plan, costs_of(plan), rank) for rank in range(plan.num_ranks)]
    assert counted == held_while_running(plan, segments_of(plan))
    assert max(map(max, counted)) > 0


def test_a_count_of_another_size_differs():
    plan = PLANS[0]
    counted = [buffer_bytes(plan, costs_of(plan, MESSAGE + 8), rank) for rank in range(2)]
    assert counted != held_while_running(plan, segments_of(plan))


def test_each_gpu_of_a_rank_bounds_its_own_share(monkeypatch):
    """Ranks of eight GPUs whose messages are eight times as large: each GPU is in the same place."""
    monkeypatch.setattr(UnfinishedSends, "max_bytes", 3 * MESSAGE)
    plan = PLANS[0]
    large = replace(costs_of(plan, 8 * MESSAGE), loan_bytes={})
    for rank in range(plan.num_ranks):
        assert buffer_bytes(plan, large, rank, 8) == buffer_bytes(plan, costs_of(plan), rank)


def test_sends_are_bounded_by_number_and_by_bytes():
    sends = UnfinishedSends()
    sends.max_count, sends.max_bytes = 3, 100
    sends.add(500, "large")
    assert not sends.are_too_many  # the newest may always travel
    sends.add(1, "small")
    assert sends.are_too_many
    assert sends.oldest == sends.take_oldest() == "large"
    assert (len(sends), sends.bytes, sends.are_too_many) == (1, 1, False)
    for name in "abc":
        sends.add(1, name)
    assert sends.are_too_many
    assert sends.take_oldest() == "small"
    assert not sends.are_too_many


def test_buffers_of_equal_size_are_used_again(monkeypatch):
    plan, made = plan_of("gpipe", 2, 2, 40), []
    empty = MessageLayout.empty
    monkeypatch.setattr(MessageLayout, "empty", lambda *args: made.append(1) or empty(*args))
    fabric = InMemoryFabric(2)
    run_on_threads(2, lambda rank: make_executor(plan, ToySegments(2), fabric.communicator(rank)).run())
    # Forward messages are two buffers. All that are received are new, for autograd keeps them; of those that
    # are sent, as many as may be unfinished and the one that is about to be.
    received, sent = 40 * (2 + 1), (UnfinishedSends.max_count + 1) * (2 + 1)
    assert len(made) == received + sent
