"""Predicted against measured: errors, causes and words, on timelines whose differences are known."""

import json
from dataclasses import replace

import pytest
from split_plans import with_weight_gradients

from helixpipe.__main__ import main
from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.plan.simulation.costs import Costs, SegmentCost, uniform_costs
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.report.comparison import compare, verdict

PLAN = build_plan("1f1b", ScheduleRequest(num_layers=2, num_ranks=2, num_microbatches=4))
COSTS = Costs({"stage0": SegmentCost(10, 20), "stage1": SegmentCost(10, 20)}, {"*": 1})


def measured(costs, plan=PLAN, *, with_waits=True):
    timeline = replace(simulate(plan, costs).timeline, source="measured", memory=())
    return timeline if with_waits else replace(timeline, waits=())


def test_what_was_predicted_happened():
    found = compare(PLAN, [measured(COSTS)], COSTS)
    assert found.ratio == 1
    assert [row.error for row in found.errors] == [0] * 4
    assert found.measured_shares == found.predicted_shares
    assert "The prediction holds within 2%." in verdict(found)


def test_a_slower_operation_is_named():
    slower = Costs({**COSTS.segments, "stage1": SegmentCost(10, 30)}, COSTS.p2p_ms)
    found = compare(PLAN, [measured(slower)], COSTS)
    errors = {(row.name, row.kind): row.error for row in found.errors}
    assert errors["stage1", "B"] == pytest.approx(0.5)
    assert [errors["stage0", "F"], errors["stage1", "F"], errors["stage0", "B"]] == [0, 0, 0]
    assert all(row.times == 4 for row in found.errors)
    words = " ".join(verdict(found))
    assert "B of stage1, +50% over 4 operations" in words


def test_whole_backwards_are_told_from_those_that_leave_w():
    plan = with_weight_gradients(PLAN, delay=1, only=(2, 3))
    costs = Costs(dict.fromkeys(plan.cost_names, SegmentCost(10, 8, 12)), {"*": 1})
    for known in (costs, None):
        found = compare(plan, [measured(costs, plan)], known)
        rows = {(row.name, row.kind): (row.times, row.predicted_ms, row.measured_ms) for row in found.errors}
        assert rows["stage0", "B+W"] == (2, 20, 20)
        assert rows["stage0", "B"] == (2, 8, 8)
        assert rows["stage0", "W"] == (2, 12, 12)
        assert all(row.error == 0 for row in found.errors)


def test_slow_messages_are_named():
    slower = Costs(COSTS.segments, {"*": 15})
    found = compare(PLAN, [measured(slower)], COSTS)
    assert found.measured_shares.busy == found.predicted_shares.busy
    assert found.waits[0].message in (
        "gradients stage0<-stage1 from rank 1",
        "activations stage0->stage1 from rank 0",
    )
    words = " ".join(verdict(found))
    assert "are more waiting for messages." in words
    assert f"The longest wait: rank {found.waits[0].rank} for {found.waits[0].message}" in words


def test_shares_add_up_to_the_makespan():
    for costs in (COSTS, Costs(COSTS.segments, {"*": 15})):
        shares = compare(PLAN, [measured(costs)], COSTS).measured_shares
        assert sum(shares) == pytest.approx(measured(costs).makespan_ms)
        assert shares.other == 0


def test_gaps_stand_for_waits_that_were_not_traced():
    costs = Costs(COSTS.segments, {"*": 7})
    traced, plain = (compare(PLAN, [measured(costs, with_waits=w)], COSTS) for w in (True, False))
    assert (traced.waits_are_gaps, plain.waits_are_gaps) == (False, True)
    assert plain.waits == traced.waits


def test_without_costs_only_waiting_is_left():
    """Measured medians with free messages: the difference is what messages cost."""
    costs = Costs(COSTS.segments, {"*": 7})
    found = compare(PLAN, [measured(costs)], None)
    assert [row.error for row in found.errors] == [0] * 4
    assert found.predicted.makespan_ms == simulate(PLAN, uniform_costs(PLAN, 10, 20)).timeline.makespan_ms
    assert found.ratio > 1


def test_the_median_iteration_is_shown():
    runs = [measured(Costs(COSTS.segments, {"*": message})) for message in (30, 2, 5)]
    found = compare(PLAN, runs, COSTS)
    assert found.measured == runs[2]
    assert found.iterations == 3


def test_timelines_of_other_plans_are_refused():
    other = build_plan("gpipe", ScheduleRequest(num_layers=2, num_ranks=2, num_microbatches=4))
    with pytest.raises(ValueError, match="rank 0 ran other operations than the plan has"):
        compare(PLAN, [measured(COSTS, other)], COSTS)
    wide = build_plan("1f1b", ScheduleRequest(num_layers=4, num_ranks=4, num_microbatches=4))
    with pytest.raises(ValueError, match="4 ranks, the plan has 2"):
        compare(PLAN, [measured(uniform_costs(wide), wide)], COSTS)


@pytest.fixture
def trace(tmp_path):
    """A trace folder as training writes it; the first iteration is much slower."""
    folder = tmp_path / "trace"
    folder.mkdir()
    (folder / "plan.json").write_text(PLAN.to_json())
    for number, message in enumerate((500, 1, 1, 1), 1):
        text = measured(Costs(COSTS.segments, {"*": message})).to_json()
        (folder / f"iteration_{number:07d}.json").write_text(text)
    return folder


def test_the_command(capsys, trace, tmp_path):
    costs = tmp_path / "costs.json"
    costs.write_text(COSTS.to_json())
    arguments = ["compare", "--plan", str(trace / "plan.json"), "--trace", str(trace)]
    assert main([*arguments, "--costs", str(costs)]) == 0
    output = capsys.readouterr().out
    assert "Operations of 3 iterations" in output
    assert "1.00x" in output
    assert main(arguments) == 0
    assert "Operations of 3 iterations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda trace: [path.unlink() for path in trace.glob("iter*")],
            "holds no iteration_*.json; train with",
        ),
        (lambda trace: (trace / "iteration_0000002.json").write_text("{}"), "not a timeline"),
        (lambda trace: (trace / "iteration_0000002.json").write_bytes(b"\xff\xfe"), "is not a text file"),
        (lambda trace: (trace / "plan.json").write_text(json.dumps({})), "not a plan"),
    ],
)
def test_wrong_traces(capsys, trace, change, message):
    change(trace)
    assert main(["compare", "--plan", str(trace / "plan.json"), "--trace", str(trace)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_trace(capsys, trace):
    assert main(["compare", "--plan", str(trace / "plan.json"), "--trace", str(trace / "none")]) == 2
    assert "is no folder; give the one of --trace-dir" in capsys.readouterr().err
