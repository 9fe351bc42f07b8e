"""Plans over the communicator that behaves like NCCL, and what that communicator itself notices."""

from functools import partial

import pytest
import torch
from communicator_worker import SCENARIOS
from moved_receives import one_place_off, posted_ahead
from nccl_like import Deadlock, NcclLikeFabric
from planning import LENGTHS, make_job
from split_plans import with_weight_gradients
from threads import run_on_threads
from toy_segments import SplitToySegments, ToySegments, collect, make_executor, run_whole

from helixpipe.elastic.search.quick_plan import plan_quickly
from helixpipe.plan import PlanError, ScheduleRequest, build_plan, validate
from helixpipe.plan.device_model import DEVICE_MODELS, find_stall
from helixpipe.reliability.record import NoProgress
from helixpipe.runtime.message import MessageBuffer
from helixpipe.runtime.transfers import Mail, Receive

DEVICES = {
    "one queue": {},
    "8 queues": {"num_queues": 8},
    "32 queues": {"num_queues": 32},
    "one stream per direction": {"num_queues": 32, "has_pair_streams": False, "connects_lazily": False},
}


def plan_of(schedule, p, m, layers=None, **options):
    request = ScheduleRequest(num_ranks=p, num_layers=layers or 2 * p, num_microbatches=m, **options)
    return build_plan(schedule, request)


def execute(plan, fabric, make=None, **options):
    make = make or partial(SplitToySegments if plan.splits_backward else ToySegments, plan.num_segments)
    segments = [make() for _ in range(plan.num_ranks)]

    def run(rank):
        executor = make_executor(plan, segments[rank], fabric.communicator(rank), **options)
        fabric.run(rank, executor.run)

    run_on_threads(plan.num_ranks, run)
    fabric.assert_empty()
    return collect(segments)


def check(plan, **devices):
    """The same losses and gradients as without any transport."""
    make = partial(SplitToySegments if plan.splits_backward else ToySegments, plan.num_segments)
    expected = run_whole(make, plan.num_microbatches)
    found = execute(plan, NcclLikeFabric(plan.num_ranks, **devices), make)
    assert found.losses == expected.losses
    for gradient, wanted in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-13)


STAGES = ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v"]


@pytest.mark.parametrize("p", [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", STAGES)
def test_stages(schedule, p):
    check(plan_of(schedule, p, 2 * p))


HELIX = [
    {"attention_range": attention_range, "head_placement": head, "num_fold": fold}
    for attention_range, head, fold in (
        ("core", "first", 1),
        ("core", "spread", 2),
        ("qkv", "first", 2),
        ("qkv", "spread", 1),
        ("block", "first", 1),
        ("block", "spread", 2),
    )
]


@pytest.mark.parametrize("p", [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", HELIX, ids=lambda options: "-".join(map(str, options.values())))
def test_helix(options, p):
    check(plan_of("helix", p, p * options["num_fold"], p, **options))


@pytest.mark.parametrize("options", [{}, {"split_weight_gradients": True}], ids=["B", "W"])
def test_helix_interlocked(options):
    check(plan_of("helix", 3, 12, 3, round_order="interlocked", **options))


@pytest.mark.parametrize("devices", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize(
    "plan",
    [plan_of("zb-v", 4, 8), plan_of("helix", 4, 8, 4, attention_range="block", head_placement="spread")],
    ids=["zb-v", "helix"],
)
def test_any_number_of_queues_and_streams(plan, devices):
    check(plan, **devices)


def test_borrowed_weights_with_weight_gradients_apart():
    check(with_weight_gradients(plan_of("helix", 3, 6, 3, attention_range="qkv"), delay=1))


@pytest.mark.parametrize("stages", [2, 4])
def test_elastic(stages):
    plan = plan_quickly(LENGTHS, make_job(8.0, num_stages=stages), num_slices=4).plan
    assert plan.slices
    check(plan)


@pytest.mark.parametrize(
    ("schedule", "p"), [("1f1b", 2), ("1f1b", 4), ("zb-h1", 3), ("helix", 2), ("helix", 4)]
)
def test_receives_posted_ahead_of_the_plan_hang(schedule, p):
    """As the executor once posted them: four operations ahead, on connections that are not made yet."""
    plan = posted_ahead(plan_of(schedule, p, 4 * p), 4)
    with pytest.raises(Deadlock, match=r"its host waits for rank \d to connect"):
        execute(plan, NcclLikeFabric(p, num_queues=32))
    with pytest.raises(Deadlock, match=r"queue 0 stands at receive"):
        execute(plan, NcclLikeFabric(p, connects_lazily=False))


@pytest.mark.parametrize(
    "plan", [plan_of("1f1b", 2, 3), plan_of("helix", 2, 2, 2, num_fold=1)], ids=["1f1b", "helix"]
)
def test_the_validators_model_hangs_where_the_device_does(plan):
    """Each receive one place off: with one queue, plan and threads come to the same end."""
    ends = set()
    for changed in one_place_off(plan):
        try:
            execute(changed, NcclLikeFabric(plan.num_ranks, connects_lazily=False))
            hangs = False
        except Deadlock:
            hangs = True
        except (AssertionError, ValueError):
            # A receive behind the operation that needs it, or two from one rank in another order.
            with pytest.raises(PlanError):
                validate(changed)
            continue
        assert hangs == bool(find_stall(changed, DEVICE_MODELS[0]))
        ends.add(hangs)
    assert ends == {False, True}


class Recording(NoProgress):
    """Remembers what this rank was said to wait for."""

    def __init__(self):
        self.waits = []

    def wait(self, message):
        self.waits.append(message)


class LosesAMessage(NcclLikeFabric):
    """The third message from rank 1 to rank 0 never arrives, and no host is told."""

    def _end(self, kernel):
        return kernel.message != (1, 0, 2) and super()._end(kernel)


def test_a_rank_whose_device_hangs_is_found_at_the_message_that_does_not_come():
    """Its host only enqueues, and would otherwise stand at the end of the iteration."""
    plan = plan_of("1f1b", 2, 12)
    records = [Recording(), Recording()]
    fabric = LosesAMessage(2, num_queues=8)

    def run(rank):
        segments, end = ToySegments(plan.num_segments), fabric.communicator(rank)
        fabric.run(rank, make_executor(plan, segments, end, progress=records[rank]).run)

    with pytest.raises(Deadlock):
        run_on_threads(2, run)
    assert str(records[0].waits[-1]) == "0RECV_B2@1"


def test_a_send_buffer_that_is_used_too_early_is_noticed(monkeypatch):
    """While the device may still send it."""
    bound = Mail.bound

    def bound_and_give(mail, operation, sent, num_bytes):
        bound(mail, operation, sent, num_bytes)
        for part in sent:
            part.shelf.give(part.buffer)

    monkeypatch.setattr(Mail, "bound", bound_and_give)
    with pytest.raises(AssertionError, match=r"the buffer of send \d+ to rank 1 is used too early, for send"):
        execute(plan_of("gpipe", 2, 8), NcclLikeFabric(2, num_queues=8))


def test_a_receive_buffer_that_is_used_too_early_is_noticed(monkeypatch):
    """When the forward has run, but not the backward: gradients are wrong, whatever the order of streams."""
    plan = plan_of("gpipe", 2, 8)
    check(plan, num_queues=8)
    monkeypatch.setattr(MessageBuffer, "is_unused", True)
    give_back = Receive.give_back
    monkeypatch.setattr(Receive, "give_back", lambda receive, first=0: give_back(receive))
    with pytest.raises((AssertionError, RuntimeError)):
        check(plan, num_queues=8)


def messages_held(run_ahead):
    """Peak over ranks, in messages of the middle of three sizes."""
    plan = plan_of("gpipe", 2, 24)
    fabric = NcclLikeFabric(2, num_queues=8)
    execute(plan, fabric, run_ahead=run_ahead)
    nbytes = ToySegments(plan.num_segments).layout(0, 0).num_bytes
    return max(fabric.peak_bytes(rank) for rank in range(2)) / nbytes


def test_messages_hold_memory_only_as_far_as_the_host_runs_ahead():
    """The device is late: without a bound it holds every message of the iteration."""
    assert messages_held(run_ahead=1000) > 20
    assert messages_held(run_ahead=2) < 8


def run_scenario(name, **devices):
    fabric = NcclLikeFabric(4, **devices)
    run_on_threads(4, lambda r: fabric.run(r, lambda: SCENARIOS[name](fabric.communicator(r))))
    fabric.assert_empty()


@pytest.mark.parametrize("name", ["order_is_kept_under_one_tag", "all_types_and_odd_sizes"])
def test_messages_arrive(name):
    run_scenario(name)


def test_two_ranks_that_both_send_first_never_connect():
    with pytest.raises(Deadlock, match="rank 0: its host waits for rank 1 to connect"):
        run_scenario("both_directions_at_once")


def test_with_connections_made_two_ranks_may_both_send_first():
    run_scenario("both_directions_at_once", num_queues=8, connects_lazily=False)


def test_messages_are_matched_by_order_and_not_by_tag():
    with pytest.raises(AssertionError, match="not equal"):
        run_scenario("tags_are_kept_apart", num_queues=8)
