"""Buffers of messages: the plan counts what the communicator holds, on every rank, at every operation."""

from dataclasses import replace

import pytest
import torch
from counting import Counting, held_while_running
from split_plans import with_weight_gradients
from test_executor import plan_of
from threads import run_on_threads
from toy_segments import ROWS, SplitToySegments, ToySegments, make_executor

from helixpipe.plan.simulation.costs import Costs, LoanBytes, SegmentCost
from helixpipe.plan.simulation.message_buffers import UnfinishedSends, buffer_bytes
from helixpipe.runtime.buffer_pool import BufferPool
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


def executors_of(plan, communicator=Counting):
    fabric = InMemoryFabric(plan.num_ranks)
    return [
        make_executor(plan, ToySegments(plan.num_segments), communicator(fabric.communicator(rank)))
        for rank in range(plan.num_ranks)
    ]


def run_all(executors):
    run_on_threads(len(executors), lambda rank: executors[rank].run())


@pytest.fixture
def made(monkeypatch):
    """The layouts of buffers that are made, in order."""
    layouts, empty = [], MessageLayout.empty
    monkeypatch.setattr(
        MessageLayout, "empty", lambda layout, *args: layouts.append(1) or empty(layout, *args)
    )
    return layouts


def test_buffers_of_equal_size_are_used_again(made):
    executors = executors_of(plan_of("gpipe", 2, 2, 40))
    run_all(executors)
    # Forward messages are two buffers, of which the backward pass keeps the first. Of those received but not
    # kept one is read while the next one is posted; of those sent, as many as may be unfinished and the one
    # that is about to be.
    kept, received, sent = 40, 2 * (1 + 1), (UnfinishedSends.max_count + 1) * (2 + 1)
    assert len(made) == kept + received + sent
    made.clear()
    run_all(executors)
    assert made == []


def test_idle_buffers_are_bounded(monkeypatch):
    monkeypatch.setattr(BufferPool, "max_bytes", 3000)
    monkeypatch.setattr(BufferPool, "max_bytes_between", 1000)
    executors = executors_of(plan_of("gpipe", 2, 2, 40))
    levels = [[], []]
    for executor, seen in zip(executors, levels, strict=True):
        pool, steps = executor.mail.pool, executor.steps
        executor.steps = [
            (op, lambda step=step, pool=pool, seen=seen: (step(), seen.append(pool.bytes)))
            for op, step in steps
        ]
    run_all(executors)
    assert 2000 < max(map(max, levels)) <= 3000
    for executor in executors:
        pool = executor.mail.pool
        idle = sum(len(shelf.idle) * shelf.layout.num_bytes for shelf in pool._shelves.values())
        assert idle == pool.bytes <= 1000


def test_a_buffer_that_a_graph_keeps_is_not_given_to_another_message():
    pool = BufferPool(torch.device("cpu"))
    shelf = pool.shelf(MessageLayout((torch.Size((3, 2)), torch.Size((4,))), torch.float64))
    buffer = shelf.take()
    first, second = (view.requires_grad_() for view in buffer.views())
    result = (first.square().sum(), second)
    del first, second
    shelf.give(buffer)
    del result
    assert not shelf.idle  # it was the graph's
    shelf.give(buffer)
    assert shelf.take() is buffer
