"""The trace file: complete, in order, with arrows that have two ends."""

import json
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.plan import Operation, ScheduleRequest, build_plan
from helixpipe.plan.simulation.costs import Costs, SegmentCost, uniform_costs
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.simulation.timeline import Level, Span, Timeline
from helixpipe.report.perfetto import perfetto_trace, write_perfetto

REQUIRED = {
    "M": {"args"},
    "X": {"cat", "cname", "dur", "args"},
    "C": {"args"},
    "s": {"id", "cat"},
    "f": {"id", "cat", "bp"},
}


def timeline_of(schedule, p=4, layers=8, m=8, p2p_ms=0.25):
    plan = build_plan(schedule, ScheduleRequest(num_ranks=p, num_layers=layers, num_microbatches=m))
    return simulate(plan, Costs(uniform_costs(plan, 1, 1, 1).segments, {"*": p2p_ms})).timeline


def events_of(*timelines):
    events = json.loads(perfetto_trace(timelines))["traceEvents"]
    by_phase = defaultdict(list)
    for event in events:
        by_phase[event["ph"]].append(event)
    return events, by_phase


def by_hand():
    """Rank 1 waits for rank 0, sends a gradient back; times do not begin at zero."""
    parse = Operation.parse
    spans = (
        (Span(parse("0F2"), 10, 11), Span(parse("0B2"), 14.5, 16.5)),
        (Span(parse("1F2"), 12, 13), Span(parse("1B2"), 13, 14)),
    )
    waits = ((Span(parse("0RECV_B2@1"), 11, 14.5),), (Span(parse("0RECV_F2@0"), 9, 12),))
    memory = ((Level(10, 100), Level(11, 100), Level(16.5, 0)), (Level(12, 50), Level(14, 0)))
    return Timeline(spans, "by hand", ("stage0", "attention"), waits, memory)


def test_every_event_has_what_its_phase_needs():
    events, by_phase = events_of(timeline_of("helix"), timeline_of("zb-h1"))
    assert set(by_phase) == set(REQUIRED)
    for event in events:
        assert {"ph", "name", "pid", "tid", "ts"} | REQUIRED[event["ph"]] <= set(event)
        assert event["ts"] >= 0
        assert event.get("dur", 0) >= 0
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)


def test_slices_say_what_ran_where_and_when():
    _, by_phase = events_of(by_hand())
    found = {e["args"]["operation"]: e for e in by_phase["X"] if e["cat"] != "wait"}
    assert set(found) == {"0F2", "0B2", "1F2", "1B2"}
    event = found["1F2"]
    assert (event["name"], event["cat"], event["tid"]) == ("F 2 · attention", "attention forward", 2)
    assert (event["ts"], event["dur"]) == (3000, 1000)  # microseconds after the first wait
    assert event["args"] == {
        "operation": "1F2",
        "segment name": "attention",
        "segment": 1,
        "micro batch": 2,
        "duration ms": 1,
    }
    assert len({found[name]["cname"] for name in found}) == 4
    (first, second) = (e for e in by_phase["X"] if e["cat"] == "wait")
    assert (first["args"]["message"], first["tid"], first["ts"], first["dur"]) == ("0RECV_F2@0", 2, 0, 3000)
    assert (second["args"]["message"], second["tid"], second["name"]) == ("0RECV_B2@1", 1, "wait for rank 1")


def test_memory_is_a_counter_of_changes():
    _, by_phase = events_of(by_hand())
    assert [(e["name"], e["ts"], e["args"]["bytes"]) for e in by_phase["C"]] == [
        ("memory of rank 0", 1000, 100),
        ("memory of rank 1", 3000, 50),
        ("memory of rank 1", 5000, 0),
        ("memory of rank 0", 7500, 0),
    ]


def test_processes_and_threads_are_named_in_order():
    _, by_phase = events_of(timeline_of("1f1b"), by_hand())
    names = [(e["pid"], e["tid"], e["args"]["name"]) for e in by_phase["M"] if e["name"].endswith("_name")]
    assert names == [
        (1, 0, "predicted"),
        *((1, rank + 1, f"rank {rank}") for rank in range(4)),
        (2, 0, "by hand"),
        (2, 1, "rank 0"),
        (2, 2, "rank 1"),
    ]
    assert len([e for e in by_phase["M"] if e["name"].endswith("_sort_index")]) == len(names)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["1f1b", "gpipe", "interleaved", "helix", "zb-h1"]), st.sampled_from([1, 2, 4]))
def test_arrows_join_operations_that_feed_each_other_across_ranks(schedule, p):
    timeline = timeline_of(schedule, p, 2 * p, 2 * p)
    _, by_phase = events_of(timeline, timeline)
    slices = {(e["pid"], e["args"]["operation"]): e for e in by_phase["X"] if e["cat"] != "wait"}
    rows = defaultdict(list)
    for event in slices.values():
        rows[event["pid"], event["tid"]].append(event)
    starts = {event["id"]: event for event in by_phase["s"]}
    ends = {event["id"]: event for event in by_phase["f"]}
    assert set(starts) == set(ends)
    assert len(starts) == len(by_phase["s"]) == len(by_phase["f"])
    joined = Counter()
    for number, start in starts.items():
        end = ends[number]
        (producer,) = (
            e for e in rows[start["pid"], start["tid"]] if e["ts"] <= start["ts"] < e["ts"] + e["dur"]
        )
        (consumer,) = (e for e in rows[end["pid"], end["tid"]] if e["ts"] == end["ts"])
        assert start["tid"] != end["tid"]
        assert start["ts"] <= end["ts"]
        source, target = (Operation.parse(e["args"]["operation"]) for e in (producer, consumer))
        assert (source.kind, source.micro_batch) == (target.kind, target.micro_batch)
        assert target.segment - source.segment == (1 if source.kind.value == "F" else -1)
        joined[start["pid"]] += 1
    rank_of = {span.operation: rank for rank, row in enumerate(timeline.spans) for span in row}
    crossing = sum(
        rank_of.get(op._replace(segment=op.segment + 1), rank) != rank and op.kind.value in "FB"
        for op, rank in rank_of.items()
    )
    assert joined[1] == joined[2] == crossing


def test_slices_of_a_rank_never_overlap():
    """Times that are no whole nanoseconds are rounded; viewers drop slices that overlap by one."""
    plan = build_plan("helix", ScheduleRequest(num_ranks=4, num_layers=8, num_microbatches=8))
    costs = Costs({name: SegmentCost(1 / 3, 0.7 / 1.1) for name in plan.cost_names}, {"*": 1 / 7})
    _, by_phase = events_of(simulate(plan, costs).timeline)
    rows = defaultdict(list)
    for event in by_phase["X"]:
        rows[event["tid"]].append((round(event["ts"] * 1000), round(event["dur"] * 1000)))
    for row in rows.values():
        for (start, duration), (following, _) in pairwise(sorted(row)):
            assert start + duration <= following


def test_a_measured_timeline_may_know_only_its_operations(tmp_path):
    timeline = Timeline(by_hand().spans, "measured, iteration 3")
    write_perfetto([timeline], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert Counter(event["ph"] for event in events) == {"M": 6, "X": 4, "s": 2, "f": 2}
    assert {event["name"] for event in events if event["ph"] == "X"} == {"F 2", "B 2"}


def test_nothing_is_refused(tmp_path):
    for timelines in ([], [Timeline(((), ()))]):
        with pytest.raises(ValueError, match="nothing to show"):
            write_perfetto(timelines, tmp_path / "trace.json")
    assert not list(tmp_path.iterdir())
