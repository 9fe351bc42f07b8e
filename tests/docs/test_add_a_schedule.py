"""The worked example of docs/architecture.md: one file and one line make a schedule that trains."""

import pytest
from page_schedule import NAME, registered, train_with_the_pages_schedule
from ranks import run_on_ranks
from training_worker import small_model

from helixpipe.__main__ import main
from helixpipe.plan import SCHEDULES, Plan, ScheduleRequest, build_plan
from helixpipe.plan.simulation.costs import uniform_costs
from helixpipe.plan.simulation.simulate import simulate

SIZES = "--num-layers 4 --pipeline-model-parallel-size 2 --num-microbatches 4"


def test_the_example_is_not_registered_outside_of_these_tests():
    assert NAME not in SCHEDULES


def test_it_is_planned_validated_simulated_and_drawn(tmp_path, capsys):
    path, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    with registered():
        assert main(f"plan --schedule {NAME} {SIZES} --output {path}".split()) == 0
        plan = Plan.from_json(path.read_text())
        assert plan == build_plan(NAME, ScheduleRequest(num_layers=4, num_ranks=2, num_microbatches=4))
        # F=1, B=2: the second rank starts at 1 and runs 4 forwards and 4 backwards; its last backward is
        # that of micro batch 0, which the first rank then needs 2 for.
        assert simulate(plan, uniform_costs(plan, 1, 2)).timeline.makespan_ms == 1 + 4 * 3 + 2
        assert main(f"draw --plan {path} --output {picture}".split()) == 0
    assert picture.stat().st_size > 1000
    assert capsys.readouterr().err == ""


def test_it_trains_like_1f1b(tmp_path):
    runs = {name: f"--pipeline-schedule {name}" for name in ("1f1b", NAME)}
    first, _ = run_on_ranks(2, train_with_the_pages_schedule, tmp_path, small_model(tmp_path), runs)
    assert [first[name]["error"] for name in runs] == ["", ""]
    assert first[NAME]["seen"] == [True] * 3, "another plan was executed"
    assert len(first[NAME]["losses"]) == 3
    # fp32 sums of the same numbers in another order.
    assert first[NAME]["losses"] == pytest.approx(first["1f1b"]["losses"], rel=1e-5)
