"""Tracing Megatron's own schedules, which shows that our plans of them are what Megatron executes."""

import pytest
from adapter_worker import trace_megatron
from models import Case
from ranks import run_on_ranks

from helixpipe.megatron_adapter.tracing import TracingTimers
from helixpipe.plan import Kind, ScheduleRequest, build_plan
from helixpipe.runtime.trace import NullClock, Trace

# (micro batches, virtual stages): fewer, as many and more than ranks; None is plain 1F1B.
RUNS = {
    1: [(1, None), (3, None)],
    2: [(1, None), (2, None), (5, None), (2, 2), (4, 2), (6, 2), (4, 4)],
    4: [(3, None), (8, None), (4, 2), (8, 2)],
}


@pytest.mark.parametrize("pp", RUNS)
def test_megatron_executes_our_plans(pp):
    case = Case(pp=pp, num_layers=8, seq_length=8)
    for rank, of_rank in enumerate(run_on_ranks(pp, trace_megatron, case, RUNS[pp])):
        for run, iterations in zip(RUNS[pp], of_rank, strict=True):
            assert len(iterations) == 3
            for iteration in iterations:
                assert iteration.ran == iteration.planned, (rank, run)
                assert iteration.traced == iteration.planned, (rank, run)
            # Two iterations of training, then an evaluation.
            num_operations = run[0] * (run[1] or 1)
            assert [len(i.planned) for i in iterations] == [2 * num_operations] * 2 + [num_operations]


@pytest.fixture
def timers():
    plan = build_plan("1f1b", ScheduleRequest(num_layers=2, num_ranks=2, num_microbatches=2))
    return TracingTimers(plan, 0, Trace(NullClock()))


def compute(timers, *kinds):
    for kind in kinds:
        name = "forward-compute" if kind is Kind.F else "backward-compute"
        timers(name, log_level=2).start()
        timers(name).stop()


def test_operations_follow_the_plan_and_start_anew_each_iteration(timers):
    for _ in range(2):
        timers("forward-backward", log_level=1).start(barrier=False)
        compute(timers, Kind.F, Kind.F, Kind.B, Kind.B)
        timers("forward-backward").stop()
        assert [str(span.operation) for span in timers.trace.spans()] == ["0F0", "0F1", "0B0", "0B1"]


def test_an_operation_of_another_kind_is_noticed(timers):
    timers("forward-backward").start()
    compute(timers, Kind.F)
    with pytest.raises(AssertionError, match="Megatron runs B, the plan says 0F1"):
        compute(timers, Kind.B)


def test_timers_of_other_things_are_ignored(timers):
    timers("forward-backward").start()
    for name in ("forward-send", "backward-recv", "all-grads-sync"):
        timers(name, log_level=1).start(barrier=True)
        timers(name).stop()
    assert timers.trace.spans() == ()
