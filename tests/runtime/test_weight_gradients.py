"""Plans with W: B leaves the weight gradients, W computes them, and nothing else changes."""

import gc
from functools import partial

import pytest
import torch
from split_plans import split_1f1b, with_weight_gradients
from test_executor import HELIX, Ranks, assert_same, plan_of, watch
from torch.multiprocessing.reductions import StorageWeakRef
from toy_segments import SplitToySegments, ToySegments, run_whole

from helixpipe.plan import Kind
from helixpipe.plan.simulation.costs import Costs, SegmentCost
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

PLANS = [
    split_1f1b(1, 3, delay=0),
    split_1f1b(1, 3, delay=2),
    split_1f1b(2, 4, delay=1),
    split_1f1b(4, 8, delay=3),
    with_weight_gradients(plan_of("gpipe", 3, 3, 4), delay=4),
    with_weight_gradients(plan_of("interleaved", 2, 4, 4, virtual_stages=2), delay=1),
    with_weight_gradients(HELIX, delay=2),
    with_weight_gradients(plan_of("1f1b", 2, 2, 4), delay=1, only=(2, 3)),
    *(plan_of(name, 3, 6, 6) for name in ("zb-h1", "zb-v", "v-half", "v-min", "dualpipe-v")),
]
NAMES = [f"{p.schedule}-p{p.num_ranks}-m{p.num_microbatches}-{number}" for number, p in enumerate(PLANS)]
every_plan = pytest.mark.parametrize("plan", PLANS, ids=NAMES)


# A whole B may come between another micro batch's B and W, and add to the gradient before it.
PARTLY_SPLIT = [
    with_weight_gradients(HELIX, delay=2, only=(2, 3)),
    with_weight_gradients(plan_of("1f1b", 2, 2, 4), delay=1, only=(0, 3)),
]


@pytest.mark.parametrize("plan", PLANS + PARTLY_SPLIT, ids=[*NAMES, "helix-partly", "1f1b-partly"])
@pytest.mark.parametrize("kind", [SplitToySegments, ToySegments], ids=["deferred", "all at B"])
def test_gradients_are_those_of_one_graph(plan, kind):
    """Segments that leave nothing for W are right, too: their W is empty."""
    expected = run_whole(partial(ToySegments, plan.num_segments), plan.num_microbatches)
    ranks = Ranks(plan, partial(kind, plan.num_segments))
    assert_same(ranks.run(), expected)
    for rank, executor in enumerate(ranks.executors):
        assert tuple(executor.trace.operations) == plan.orders[rank]
        computed = tuple(op for op in plan.orders[rank] if op.kind.is_compute)
        assert tuple(span.operation for span in executor.trace.spans()) == computed
        # B frees what a forward has kept; what W needs is accounted for by the segments.
        assert executor.store.peak == peak_until_b(plan)[rank]
        assert len(executor.segments.weight_gradients) == 0
    ranks.fabric.assert_empty()


def peak_until_b(plan):
    """(segment, micro batch) pairs between their F and their B."""
    return peak_bytes(
        plan, Costs(dict.fromkeys(plan.cost_names, SegmentCost(0, 0, bytes=1, weight_bytes=0)), {})
    )


@every_plan
def test_splitting_changes_no_bit_where_micro_batches_are_added_in_the_same_order(plan):
    """Every W here comes in the order of its segment's B."""
    whole = plan.with_orders([op for op in order if op.kind is not Kind.W] for order in plan.orders)
    make = partial(SplitToySegments, plan.num_segments)
    split, together = Ranks(plan, make).run(), Ranks(whole, make).run()
    assert split.losses == together.losses
    for found, expected in zip(split.gradients, together.gradients, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("plan", PLANS + PARTLY_SPLIT, ids=[*NAMES, "helix-partly", "1f1b-partly"])
def test_weights_change_at_the_last_operation_and_at_no_other(plan):
    ranks = Ranks(plan, partial(SplitToySegments, plan.num_segments))
    for executor in ranks.executors:
        check_gradients(executor)
    ranks.run()


def check_gradients(executor):
    """Compare the weights' gradients before and after each compute operation.

    They change at W, and at B of a micro batch without W.
    """
    segments = executor.segments

    def checked(operation, run):
        before = [None if w.grad is None else w.grad.clone() for w in segments.weights]
        run()
        for number, (weight, old) in enumerate(zip(segments.weights, before, strict=True)):
            same = weight.grad is old if old is None else torch.equal(weight.grad, old)
            completes = operation.kind is executor.plan.last_kind(operation.micro_batch)
            assert same != (completes and number == operation.segment), operation

    watch(executor, {Kind.F, Kind.B, Kind.W}, checked)


@pytest.mark.parametrize("plan", [PLANS[3], PLANS[5]], ids=["1f1b", "interleaved"])
def test_evaluation_of_a_split_plan_keeps_nothing(plan):
    expected = run_whole(partial(ToySegments, plan.num_segments), plan.num_microbatches)
    ranks = Ranks(plan.forward_only(), partial(SplitToySegments, plan.num_segments))
    assert ranks.run().losses == expected.losses
    assert all(weight.grad is None for segments in ranks.segments for weight in segments.weights)


def test_backward_context_surrounds_w_too():
    entered = []

    class Context:
        def __init__(self, operation):
            entered.append(operation)

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    plan = split_1f1b(1, 3, delay=1)
    Ranks(plan, partial(SplitToySegments, 1), backward_context=Context).run()
    assert entered == [op for op in plan.orders[0] if op.kind in (Kind.B, Kind.W)]


class WatchedSegments(SplitToySegments):
    """Notes which activations are alive when a queue's work begins and ends."""

    def __init__(self, num_segments):
        super().__init__(num_segments)
        self.inputs, self.activations = [], []

    def _multiply(self, hidden, weight):
        product = super()._multiply(hidden, weight)
        # What the product multiplies is needed by W; tanh's output by B alone.
        self.inputs.append(StorageWeakRef(hidden.untyped_storage()))
        output = torch.tanh(product)
        self.activations.append(StorageWeakRef(output.untyped_storage()))
        return output


def test_b_frees_everything_but_what_w_needs():
    plan = split_1f1b(1, 2, delay=2)
    ranks = Ranks(plan, partial(WatchedSegments, 1))
    (executor,), (segments,) = ranks.executors, ranks.segments
    alive = []

    def noted(operation, run):
        run()
        gc.collect()
        alive.append(
            (
                str(operation),
                sum(not reference.expired() for reference in segments.inputs),
                sum(not reference.expired() for reference in segments.activations),
            )
        )

    watch(executor, {Kind.B, Kind.W}, noted)
    ranks.run()
    assert [entry for entry in alive if "B" in entry[0]] == [("0B0", 1, 0), ("0B1", 2, 0)]
    assert [entry for entry in alive if "W" in entry[0]] == [("0W0", 1, 0), ("0W1", 0, 0)]


def test_work_runs_in_the_order_it_was_added_and_is_forgotten():
    queue, done = DeferredWeightGradients(), []
    with queue.collect((0, 0)):
        for word in "ab":
            queue.add(partial(done.append, word))
    with queue.collect((0, 1)):
        queue.add(partial(done.append, "c"))
    assert (done, len(queue)) == ([], 2)
    with pytest.raises(AssertionError, match=r"\[\(0, 0\), \(0, 1\)\]"):
        queue.assert_empty()
    queue.run((0, 1))
    queue.run((0, 0))
    assert done == ["c", "a", "b"]
    queue.assert_empty()
    with pytest.raises(AssertionError, match="segment 0, micro batch 0 is not stored"):
        queue.run((0, 0))


def test_without_a_b_that_collects_work_is_done_at_once():
    queue, done = DeferredWeightGradients(), []
    queue.add(partial(done.append, "now"))
    assert done == ["now"]


def test_a_b_that_fails_leaves_nothing_open():
    queue, done = DeferredWeightGradients(), []

    def fail():
        with queue.collect((0, 0)):
            queue.add(partial(done.append, "never"))
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    queue.assert_empty()
    queue.add(partial(done.append, "now"))
    assert done == ["now"]
