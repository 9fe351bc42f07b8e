"""Plans of sliced helix, executed on threads: keys and values travel, and their gradients come home."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import Case, make_config
from nccl_like import NcclLikeFabric
from sliced_toy import CHANNELS, GROUPS, SlicedToySegments, collect, run_whole_sequences
from threads import run_on_threads
from toy_segments import RendezvousFabric, make_executor

from helixpipe.megatron_adapter.segments.slices import operations_of_layer
from helixpipe.plan import Kind, Operation, ScheduleRequest, build_plan
from helixpipe.plan.build import complete
from helixpipe.plan.simulation.context_memory import context_changes
from helixpipe.plan.simulation.costs import Costs, SegmentCost
from helixpipe.plan.slice_ends import with_slice_ends
from helixpipe.runtime.communicator import InMemoryFabric

# Bytes of a token's keys, or of its values.
TOKEN = GROUPS * CHANNELS * torch.float64.itemsize


def sliced(p, layers, fold=1, m=1, **options):
    wanted = ScheduleRequest(num_ranks=p, num_layers=layers, num_microbatches=m, num_fold=fold, **options)
    # Every rank has all weights, so none are on loan.
    plan = build_plan("sliced-helix", wanted, compute_only=True)
    plan = complete(replace(plan, loans=()))
    # Lengths that fall, and of which none is a multiple of another.
    ends, end = [], 0
    for j in range(p * fold):
        end += 3 + 2 * (p * fold - j)
        ends.append(end)
    return with_slice_ends(plan, tuple(ends))


PLANS = {
    "one rank": sliced(1, 2, 2),
    "two ranks": sliced(2, 3, 2),
    "three ranks": sliced(3, 3, 1, 2),
    "three ranks, three folds": sliced(3, 4, 3),
    "four ranks": sliced(4, 6, 2),
    "lent again": sliced(4, 5, 2, 2, resend_context=True),
    "QKV apart": sliced(3, 4, 2, attention_range="qkv"),
    "QKV apart, lent again": sliced(3, 5, 2, attention_range="block", resend_context=True),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
FABRICS = {"in memory": InMemoryFabric, "nccl-like": NcclLikeFabric, "rendezvous": RendezvousFabric}


class Ranks:
    """The executors of all ranks."""

    def __init__(self, plan, make_fabric=InMemoryFabric, kind=SlicedToySegments, **options):
        self.fabric = make_fabric(plan.num_ranks)
        self.segments = [kind(plan, rank, **options) for rank in range(plan.num_ranks)]
        self.executors = [
            make_executor(plan, segments, self.fabric.communicator(rank))
            for rank, segments in enumerate(self.segments)
        ]

    def run(self):
        run = getattr(self.fabric, "run", lambda rank, function: function())
        run_on_threads(len(self.executors), lambda rank: run(rank, self.executors[rank].run))
        self.fabric.assert_empty()
        return self


@pytest.mark.parametrize("make_fabric", FABRICS.values(), ids=FABRICS)
@every_plan
def test_losses_and_gradients_are_those_of_whole_sequences(plan, make_fabric):
    ranks = Ranks(plan, make_fabric).run()
    loss, gradients = collect(ranks.segments)
    wanted_loss, wanted = run_whole_sequences(plan)
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    for found, expected in zip(gradients, wanted, strict=True):
        assert (found - expected).norm() < 1e-12 * expected.norm()
    for rank, executor in enumerate(ranks.executors):
        assert tuple(executor.trace.operations) == plan.orders[rank]


@every_plan
def test_an_evaluation_gives_the_same_losses_and_leaves_nothing(plan):
    ranks = Ranks(plan.forward_only())
    for _ in range(2):
        ranks.run()
        losses = [loss for segments in ranks.segments for loss in segments.losses.values()]
        assert sum(losses) == pytest.approx(run_whole_sequences(plan)[0], rel=1e-12)


def test_a_second_iteration_starts_from_nothing():
    ranks = Ranks(PLANS["four ranks"]).run()
    _, once = collect(ranks.segments)
    once = [gradient.clone() for gradient in once]
    _, twice = collect(ranks.run().segments)
    for first, both in zip(once, twice, strict=True):
        torch.testing.assert_close(both, 2 * first)


class Watched(SlicedToySegments):
    """Knows what the rank holds of slices beside what its forwards keep."""

    def held(self, executor, done):
        slices = {(slot, start): kept for slot, s in self.store._slices.items() for start, kept in s.items()}
        sums = [t for kept in slices.values() if kept.grad_key is not None for t in kept.sums()]
        keys = [t for key, kept in slices.items() if key not in self.own for t in (kept.key, kept.value)]
        # Its own that are still to be lent, once its forward does not keep them any more.
        late = [
            t
            for key, (_, *pair) in self.contexts._own.items()
            if Operation(key[0], Kind.B if executor.plan.has_backward else Kind.F, key[1]) in done
            for t in pair
        ]
        returned = [t for pairs in self.contexts._returned.values() for pair in pairs for t in pair]
        posted = [
            buffer.data
            for op, receive in executor._receives.items()
            if op.kind in (Kind.RECV_K, Kind.RECV_KB, Kind.RECV_D)
            for _, _, buffer in receive._incoming
        ]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in keys + late + returned + posted
        }
        # Headers are less than a token's keys.
        return sum(size - size % TOKEN for size in storages.values()) + sum(t.nbytes for t in sums)

    @property
    def own(self):
        """Slices that attend here: their keys and values are among what their forwards keep."""
        return {
            (((segment + 1) // self.per_layer, piece.sequence), piece.start)
            for segment in filter(self.attends, range(self.last))
            for i, piece in enumerate(self.pieces)
            if self.plan.rank_of(segment, i) == self.rank
        }


def noting(executor, segments, noted):
    """The executor's steps, each followed by a note of what is held."""

    def note(op, step):
        def run():
            step()
            noted.append((op, segments.held(executor, {op, *executor.trace.operations})))

        return op, run

    return [note(op, step) for op, step in executor.steps]


def costs_of(plan, pieces):
    """Of keys and values alone, and of sums, which here have the same type."""
    cost = {
        plan.cost_name(0, i): SegmentCost(1, 1, context_bytes=size, gradient_bytes=size)
        for i, size in enumerate(2 * TOKEN * piece.length for piece in pieces)
    }
    names = [
        (plan.cost_name(s, i), plan.cost_name(0, i))
        for s in range(plan.num_segments)
        for i in range(len(pieces))
    ]
    return Costs({name: cost[first] for name, first in names}, {})


@every_plan
@pytest.mark.parametrize("is_evaluated", [False, True], ids=["training", "evaluation"])
def test_the_store_holds_what_the_plan_says_after_every_operation(plan, is_evaluated):
    plan = plan.forward_only() if is_evaluated else plan
    ranks = Ranks(plan, kind=Watched)
    notes = [[] for _ in ranks.executors]
    for executor, segments, noted in zip(ranks.executors, ranks.segments, notes, strict=True):
        executor.steps = noting(executor, segments, noted)
    ranks.run()
    costs = costs_of(plan, ranks.segments[0].pieces)
    for rank, noted in enumerate(notes):
        taken, dropped = context_changes(plan, costs, rank)
        wanted = 0
        assert [op for op, _ in noted] == list(plan.orders[rank])
        # What a message takes or drops is counted with the computation that follows it.
        computed = [(op, held) for op, held in noted if op.kind.is_compute]
        for (op, held), more, less in zip(computed, taken, dropped, strict=True):
            wanted += more - less
            assert held == wanted, str(op)
        assert noted[-1][1] == 0


def drops(method):
    """Segments whose contexts leave out what a method brings."""

    class Without(SlicedToySegments):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            original = getattr(self.contexts, method)
            setattr(self.contexts, method, lambda *args: _emptied(original, *args))

    return Without


def _emptied(original, *args):
    *first, tensors = args
    return original(*first, tuple(torch.zeros_like(tensor) for tensor in tensors))


@pytest.mark.parametrize("method", ["borrow", "take_back"])
def test_the_comparison_notices_keys_and_gradients_that_do_not_arrive(method):
    plan = PLANS["four ranks"]
    loss, gradients = collect(Ranks(plan, kind=drops(method)).run().segments)
    wanted_loss, wanted = run_whole_sequences(plan)
    errors = [
        float((found - expected).norm() / expected.norm())
        for found, expected in zip(gradients, wanted, strict=True)
    ]
    assert max(errors) > 1e-3
    assert (abs(loss - wanted_loss) < 1e-9) == (method == "take_back")


def test_each_contribution_is_rounded_once_and_summed_in_fp32():
    """In bf16 gradients of keys are as near to the truth as if PyTorch had summed them over the sequence."""
    plan = PLANS["four ranks"]
    _, truth = run_whole_sequences(plan, torch.float32)
    _, whole = run_whole_sequences(plan, torch.bfloat16)
    _, found = collect(Ranks(plan, dtype=torch.bfloat16).run().segments)

    def errors(gradients):
        pairs = zip(gradients, truth, strict=True)
        return sum(float((g.float() - t).norm() / t.norm()) for g, t in pairs)

    assert errors(found) < 1.5 * errors(whole)


def test_slices_end_by_the_operations_of_a_layer_where_nothing_else_is_known():
    """By hand: products of a token, and two products for half of all pairs of tokens."""
    config = make_config(Case(pp=1, style="llama"))
    products = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 80
    assert operations_of_layer(config) == (2 * products, 2 * 2 * 32 / 2)
    mlp = 2 * 32 * 128
    assert operations_of_layer(make_config(Case(pp=1))).linear == 2 * (4 * 32 * 32 + mlp)
