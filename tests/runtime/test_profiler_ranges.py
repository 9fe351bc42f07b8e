"""Operations as a profiler sees them."""

import json

import pytest
import torch
from toy_segments import ToySegments, make_executor

from helixpipe.plan import Operation, ScheduleRequest, build_plan
from helixpipe.runtime import profiler_ranges
from helixpipe.runtime.communicator import InMemoryFabric
from helixpipe.runtime.profiler_ranges import range_maker, with_ranges

PLAN = build_plan("helix", ScheduleRequest(num_layers=2, num_ranks=1, num_microbatches=2))


def operations_in(profiler, folder):
    """Names of the ranges that are operations, in order of their starts."""
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    known = {str(op) for order in PLAN.orders for op in order}
    found = [
        event for event in events if event.get("name") in known and event.get("cat") == "user_annotation"
    ]
    return [event["name"] for event in sorted(found, key=lambda event: event["ts"])]


def test_every_operation_is_a_range_with_its_text_form(tmp_path):
    fabric = InMemoryFabric(1)
    executor = make_executor(PLAN, ToySegments(PLAN.num_segments), fabric.communicator(0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        executor.run()
    assert operations_in(profiler, tmp_path) == [str(op) for op in PLAN.orders[0]]
    executor.run()


def test_without_a_profiler_steps_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(profiler_ranges, "record_function", lambda text: pytest.fail("a range for nobody"))
    steps = [(Operation.parse("0F0"), lambda: None)]
    assert range_maker() is None
    assert with_ranges(steps) is steps


def test_ranges_of_nvtx_on_a_gpu(monkeypatch):
    """As a model: no GPU is needed to see which ranges are opened and closed."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda text: seen.append(text))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("end"))
    assert range_maker() is None, "nobody watches"
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")

    def fails():
        raise RuntimeError("out of memory")

    ((_, step),) = with_ranges([(Operation.parse("3B2"), fails)])
    with pytest.raises(RuntimeError, match="out of memory"):
        step()
    assert seen == ["3B2", "end"]
