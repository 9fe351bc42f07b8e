"""The executor on toy segments: ranks are threads, the reference is one plain autograd graph."""

from collections import deque
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from nccl_like import NcclLikeFabric
from split_plans import with_weight_gradients
from threads import run_on_threads
from torch.multiprocessing.reductions import StorageWeakRef
from toy_segments import (
    TIMEOUT_S,
    RendezvousFabric,
    SplitToySegments,
    ToySegments,
    collect,
    make_executor,
    run_whole,
)

from helixpipe.plan import Kind, ScheduleRequest, build_plan
from helixpipe.plan.simulation.memory import peak_activations
from helixpipe.plan.simulation.message_buffers import UnfinishedSends
from helixpipe.runtime.buffer_pool import BufferPool
from helixpipe.runtime.communicator import InMemoryFabric
from helixpipe.runtime.message import HEADER_WORDS


def plan_of(schedule, p, layers, m, **options):
    wanted = ScheduleRequest(num_ranks=p, num_layers=layers, num_microbatches=m, **options)
    return build_plan(schedule, wanted)


PLANS = [
    *(plan_of("gpipe", p, p, m) for p, m in ((1, 1), (2, 3), (4, 5))),
    *(plan_of("1f1b", p, p, m) for p, m in ((1, 3), (2, 1), (2, 5), (3, 4), (4, 8))),
    *(
        plan_of("interleaved", p, p * v, p * rounds, virtual_stages=v)
        for p, v, rounds in ((1, 2, 2), (2, 2, 1), (2, 3, 2), (4, 2, 2))
    ),
    *(
        plan_of("helix", p, p if p > 2 else 2 * p, p * fold * rounds, num_fold=fold)
        for p in (1, 2, 3, 4)
        for fold in (1, 2)
        for rounds in (1, 2)
    ),
    *(
        plan_of("helix", p, p if p > 2 else 2 * p, 2 * p * rounds, attention_range="block")
        for p, rounds in ((2, 2), (3, 1), (4, 2))
    ),
    plan_of("helix", 3, 3, 12, attention_range="qkv", head_placement="spread"),
]
LENDING = PLANS[-1]
NAMES = [
    f"{p.schedule}-p{p.num_ranks}-s{p.num_segments}-m{p.num_microbatches}" + "-loans" * bool(p.loans)
    for p in PLANS
]
HELIX = plan_of("helix", 3, 3, 6)
every_plan = pytest.mark.parametrize("plan", PLANS, ids=NAMES)
one_of_each = pytest.mark.parametrize(
    "plan",
    [PLANS[2], PLANS[6], PLANS[10], HELIX, LENDING],
    ids=lambda p: p.schedule + "-loans" * bool(p.loans),
)


TRANSPORTS = {
    "in-memory": InMemoryFabric,
    # Needs no time limit: it knows when nobody can go on.
    "nccl-like": lambda size, timeout_s: NcclLikeFabric(size),
}


@pytest.fixture(autouse=True, params=TRANSPORTS)
def transport(request, monkeypatch):
    """Every test runs over both, unless it brings its own."""
    monkeypatch.setattr(Ranks, "make_fabric", TRANSPORTS[request.param])


class Ranks:
    """The executors of all ranks of a plan, each with segments of its own."""

    make_fabric = InMemoryFabric

    def __init__(self, plan, make=None, fabric=None, executor=make_executor, timeout_s=TIMEOUT_S, **options):
        self.plan = plan
        self.fabric = fabric or type(self).make_fabric(plan.num_ranks, timeout_s)
        make = make or partial(ToySegments, plan.num_segments)
        self.segments = [make() for _ in range(plan.num_ranks)]
        self.executors = [
            executor(plan, segments, self.fabric.communicator(rank), **options)
            for rank, segments in enumerate(self.segments)
        ]

    def run(self):
        # A device ends what its host has enqueued; in memory there is none.
        run = getattr(self.fabric, "run", lambda rank, function: function())
        run_on_threads(self.plan.num_ranks, lambda rank: run(rank, self.executors[rank].run))
        return collect(self.segments)


def assert_same(found, expected, times=1):
    """Losses to the last bit; gradients but for the order in which micro batches are added."""
    assert found.losses == expected.losses
    for gradient, wanted in zip(found.gradients, expected.gradients, strict=True):
        assert wanted.norm() > 1e-6
        torch.testing.assert_close(gradient, times * wanted, rtol=1e-11, atol=1e-13)


@every_plan
def test_any_plan_gives_the_losses_and_gradients_of_one_graph(plan):
    expected = run_whole(partial(ToySegments, plan.num_segments), plan.num_microbatches)
    ranks = Ranks(plan)
    assert_same(ranks.run(), expected)
    for rank, executor in enumerate(ranks.executors):
        assert tuple(executor.trace.operations) == plan.orders[rank]
        computed = tuple(op for op in plan.orders[rank] if op.kind.is_compute)
        assert tuple(span.operation for span in executor.trace.spans()) == computed
        waits = sorted(wait.operation for wait in executor.trace.waits())
        assert waits == sorted(op for op in plan.orders[rank] if op.kind.is_receive)
        assert executor.store.peak == peak_activations(plan)[rank]
        assert len(executor.store) == 0
        executor._assert_empty()
    ranks.fabric.assert_empty()


@one_of_each
def test_iterations_add_up(plan):
    expected = run_whole(partial(ToySegments, plan.num_segments), plan.num_microbatches)
    ranks = Ranks(plan)
    ranks.run()
    assert_same(ranks.run(), expected, times=2)
    for rank, executor in enumerate(ranks.executors):
        assert tuple(executor.trace.operations) == plan.orders[rank]


@every_plan
def test_evaluation_gives_the_same_losses_and_keeps_nothing(plan):
    expected = run_whole(partial(ToySegments, plan.num_segments), plan.num_microbatches)
    ranks = Ranks(plan.forward_only())
    for _ in range(2):
        found = ranks.run()
        assert found.losses == expected.losses
    assert all(weight.grad is None for segments in ranks.segments for weight in segments.weights)
    for rank, executor in enumerate(ranks.executors):
        assert tuple(executor.trace.operations) == plan.forward_only().orders[rank]
        assert executor.store.peak == 0
    ranks.fabric.assert_empty()


def test_evaluation_builds_no_graph():
    class Watchful(ToySegments):
        def forward(self, segment, micro_batch, inputs):
            assert not any(tensor.requires_grad for tensor in inputs)
            outputs = super().forward(segment, micro_batch, inputs)
            assert not any(tensor.requires_grad for tensor in outputs)
            return outputs

    Ranks(HELIX.forward_only(), partial(Watchful, HELIX.num_segments)).run()


@one_of_each
def test_the_gradient_of_an_unused_input_is_zero(plan):
    make = partial(ToySegments, plan.num_segments, deaf={0, 1, plan.num_segments - 1})
    assert_same(Ranks(plan, make).run(), run_whole(make, plan.num_microbatches))


@pytest.mark.parametrize("plan", [PLANS[2], HELIX], ids=["gpipe", "helix"])
def test_an_output_may_need_no_gradient(plan):
    make = partial(ToySegments, plan.num_segments, frozen={0, 1, plan.num_segments - 1})
    assert_same(Ranks(plan, make).run(), run_whole(make, plan.num_microbatches))


@pytest.mark.parametrize("plan", [PLANS[2], HELIX], ids=["gpipe", "helix"])
def test_a_segment_may_have_nothing_to_train(plan):
    """A frozen embedding: nothing that segment 0 returns needs a gradient."""

    def make():
        segments = ToySegments(plan.num_segments)
        segments.weights[0].requires_grad_(False)
        return segments

    found = Ranks(plan, make).run()
    expected = run_whole(make, plan.num_microbatches)
    assert found.losses == expected.losses
    assert not found.gradients[0].any()
    for gradient, wanted in zip(found.gradients[1:], expected.gradients[1:], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-13)


def watch(executor, kinds, look):
    """Let ``look(operation, step)`` run the steps of some kinds."""
    executor.steps = [
        (op, partial(look, op, step) if op.kind in kinds else step) for op, step in executor.steps
    ]


class RecordingCommunicator:
    """Counts what a rank has sent and not yet waited for, and remembers every tag."""

    def __init__(self, inner):
        self.inner, self.rank, self.size = inner, inner.rank, inner.size
        self.unfinished = deque()
        self.most_unfinished = 0
        self.sent, self.received = [], []

    def send(self, buffer, peer, tag):
        handle = self.inner.send(buffer, peer, tag)
        self.sent.append((self.rank, peer, tag))
        self.unfinished.append(handle)
        self.most_unfinished = max(self.most_unfinished, len(self.unfinished))
        return OldestFirst(handle, self.unfinished)

    def receive(self, buffer, peer, tag):
        self.received.append((peer, self.rank, tag))
        return self.inner.receive(buffer, peer, tag)


class OldestFirst:
    def __init__(self, handle, unfinished):
        self.handle, self.unfinished = handle, unfinished

    def wait(self):
        assert self.unfinished.popleft() is self.handle
        self.handle.wait()


def recorded(plan):
    recorders = []

    def record(plan, segments, communicator):
        recorders.append(RecordingCommunicator(communicator))
        return make_executor(plan, segments, recorders[-1])

    Ranks(plan, executor=record).run()
    return recorders


def test_unfinished_sends_are_bounded_and_all_waited_for():
    recorders = recorded(plan_of("gpipe", 2, 2, 40))
    # Forward messages are two buffers.
    most = UnfinishedSends.max_count + 1
    assert [recorder.most_unfinished for recorder in recorders] == [2 * most, most]
    assert not any(recorder.unfinished for recorder in recorders)


@every_plan
def test_every_message_has_a_tag_of_its_own_at_both_ends(plan):
    recorders = recorded(plan)
    sent = [key for recorder in recorders for key in recorder.sent]
    assert sorted(sent) == sorted(key for recorder in recorders for key in recorder.received)
    assert len({tag for _, _, tag in sent}) == len(sent)


@every_plan
def test_no_plan_blocks_when_every_send_waits_for_its_receive(plan):
    def patient(plan, segments, communicator):
        executor = make_executor(plan, segments, communicator)
        executor.mail.unfinished.max_count = 0
        return executor

    expected = run_whole(partial(ToySegments, plan.num_segments), plan.num_microbatches)
    ranks = Ranks(plan, fabric=RendezvousFabric(plan.num_ranks), executor=patient)
    assert_same(ranks.run(), expected)


class WatchedOutputs(ToySegments):
    """Before each forward, whatever segment 0 has returned must be gone; ``hold`` keeps it on purpose."""

    def __init__(self, num_segments, hold):
        super().__init__(num_segments)
        self.hold = hold
        self.returned, self.held = [], []

    def forward(self, segment, micro_batch, inputs):
        assert all(reference.expired() for reference in self.returned), "outputs are still held"
        # tanh's graph needs its output; that of an addition does not.
        outputs = tuple(output + 1 for output in super().forward(segment, micro_batch, inputs))
        if segment == 0:
            self.returned += [StorageWeakRef(output.untyped_storage()) for output in outputs]
        if self.hold:
            self.held.append(outputs)
        return outputs


@pytest.mark.parametrize("forward_only", [False, True])
def test_the_data_of_an_output_is_freed_once_it_is_sent(forward_only):
    plan = plan_of("gpipe", 2, 2, 3)
    plan = plan.forward_only() if forward_only else plan
    Ranks(plan, partial(WatchedOutputs, 2, hold=False)).run()
    with pytest.raises(AssertionError, match="still held"):
        Ranks(plan, partial(WatchedOutputs, 2, hold=True), timeout_s=0.2).run()


@pytest.mark.parametrize("plan", [HELIX, plan_of("helix", 4, 4, 8)], ids=["3 ranks", "4 ranks"])
def test_of_an_input_only_what_the_backward_pass_needs_is_kept(plan):
    """Whether it has come as a message or from the same rank; also where a residual was only passed on."""
    looks = {}
    ranks = Ranks(plan)
    for executor in ranks.executors:

        def look(operation, step, store=executor.store):
            saved = store._values[operation.segment, operation.micro_batch]
            looks[operation] = [tensor.untyped_storage().nbytes() for tensor in saved.inputs]
            step()

        watch(executor, {Kind.B}, look)
    assert_same(ranks.run(), run_whole(partial(ToySegments, plan.num_segments), plan.num_microbatches))
    assert len(looks) == plan.num_segments * plan.num_microbatches
    for operation, found in looks.items():
        if operation.segment == 0:
            continue
        (hidden, _) = ToySegments(plan.num_segments).layout(operation.segment - 1, 0).shapes
        kept, rest = found
        assert rest == 8
        came = plan.rank_of(operation.segment - 1, operation.micro_batch) != plan.rank_of(
            operation.segment, operation.micro_batch
        )
        assert kept == 8 * (hidden.numel() + (HEADER_WORDS if came else 0)), operation


def test_what_is_not_kept_cannot_be_read_unnoticed(monkeypatch):
    class Reading(ToySegments):
        def forward(self, segment, micro_batch, inputs):
            outputs = super().forward(segment, micro_batch, inputs)
            if segment == 1:
                # A product needs both of its factors.
                outputs = (outputs[0], inputs[1] * inputs[1])
            return outputs

    # With buffers used again autograd refuses to read it, once another message is there.
    monkeypatch.setattr(BufferPool, "max_bytes", 0)
    found = Ranks(HELIX, partial(Reading, HELIX.num_segments)).run()
    assert any(gradient.isnan().any() for gradient in found.gradients)


def test_backward_context_surrounds_each_backward_and_nothing_else():
    entered, inside, computed = [], [], []

    class Watched(ToySegments):
        def __init__(self, num_segments):
            super().__init__(num_segments)
            for weight in self.weights:
                weight.register_hook(lambda grad: computed.append(list(inside)))

        def forward(self, segment, micro_batch, inputs):
            assert not inside
            return super().forward(segment, micro_batch, inputs)

    @contextmanager
    def context(operation):
        entered.append(operation)
        inside.append(operation)
        yield
        inside.remove(operation)

    plan = plan_of("helix", 1, 2, 4)
    Ranks(plan, partial(Watched, plan.num_segments), backward_context=context).run()
    backwards = [op for op in plan.orders[0] if op.kind is Kind.B]
    assert entered == backwards
    assert computed == [[op] for op in backwards]


@pytest.mark.parametrize("plan", [plan_of("1f1b", 1, 1, 2), HELIX], ids=["one rank", "three ranks"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_inside_a_segment_reaches_the_caller(plan, where):
    class Failing(ToySegments):
        def forward(self, segment, micro_batch, inputs):
            outputs = super().forward(segment, micro_batch, inputs)
            if (segment, micro_batch) == (self.num_segments - 1, 1):
                self.fail(outputs)
            return outputs

        def fail(self, outputs):
            if where == "forward":
                raise ArithmeticError("segment failed")
            outputs[0].register_hook(self.raise_in_backward)

        def raise_in_backward(self, grad):
            raise ArithmeticError("segment failed")

    # Short, because the other ranks wait in vain; long enough for a busy machine to reach the failure.
    with pytest.raises(ArithmeticError, match="segment failed"):
        Ranks(plan, partial(Failing, plan.num_segments), timeout_s=1.5).run()


def test_an_output_of_another_shape_is_refused_before_it_is_sent():
    class Short(ToySegments):
        def forward(self, segment, micro_batch, inputs):
            outputs = super().forward(segment, micro_batch, inputs)
            return (outputs[0][:-1], *outputs[1:]) if segment == 0 else outputs

    with pytest.raises(ValueError, match=r"message holds \[\(2, 4\)\].*expects \[\(3, 4\)\]"):
        Ranks(plan_of("1f1b", 2, 2, 1), partial(Short, 2), timeout_s=0.5).run()


def poison(ranks):
    """Make the weights unusable that a rank has in these tests but not in a job: those it borrows."""
    for rank, segments in enumerate(ranks.segments):
        owned = {loan.segment for loan in ranks.plan.loans if loan.owner == rank}
        for segment in {loan.segment for loan in ranks.plan.loans} - owned:
            segments.weights[segment].data.fill_(torch.nan)


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan.loans], ids=lambda p: f"p{p.num_ranks}")
@pytest.mark.parametrize("split", [False, True])
def test_borrowers_compute_with_the_owners_weights_and_return_their_gradients(plan, split):
    plan = with_weight_gradients(plan, delay=1) if split else plan
    make = partial(SplitToySegments if split else ToySegments, plan.num_segments)
    ranks = Ranks(plan, make)
    poison(ranks)
    assert_same(ranks.run(), run_whole(make, plan.num_microbatches))
    for loan in plan.loans:
        assert ranks.segments[loan.borrower].weights[loan.segment].grad is None
        assert ranks.segments[loan.owner].weights[loan.segment].grad is not None


def test_an_evaluation_forgets_a_loan_with_its_last_micro_batch():
    plan = LENDING.forward_only()
    held = []

    class Counting(ToySegments):
        def forward(self, segment, micro_batch, inputs):
            held.append(len(self.lending._borrowed))
            return super().forward(segment, micro_batch, inputs)

    Ranks(plan, partial(Counting, plan.num_segments)).run()
    assert set(held) == {0, 1}


def test_only_whole_plans_for_this_number_of_ranks_are_taken():
    plan = plan_of("1f1b", 2, 2, 1)
    for unfit, size in ((plan.compute_only(), 2), (plan, 3)):
        with pytest.raises(AssertionError):
            make_executor(unfit, ToySegments(2), InMemoryFabric(size).communicator(0))
