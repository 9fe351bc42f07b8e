"""Stages with different numbers of layers: planned, written, costed, and refused where they do not fit."""

import pytest

from helixpipe.plan import Plan, ScheduleRequest, build_plan
from helixpipe.plan.cost_model import HARDWARE, MODELS, Recompute, Workload, costs_of_plan, predict_pieces
from helixpipe.plan.cost_model.segments import rank_parameters
from helixpipe.plan.execution import Execution
from helixpipe.plan.fit import check_executable, check_stages_fit
from helixpipe.plan.schedules import SCHEDULES, planned_ahead
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.stage_layers import layers_of_stages, parse_stage_layers

UNEVEN = (6, 10, 10, 6)
TAKE_THEM = [name for name in planned_ahead() if "stage_layers" in SCHEDULES[name].options]


def planned(schedule="1f1b", layers=UNEVEN, **options):
    request = ScheduleRequest(num_layers=32, num_ranks=4, num_microbatches=8, stage_layers=layers, **options)
    return build_plan(schedule, request)


@pytest.mark.parametrize("schedule", TAKE_THEM)
def test_a_plan_says_which_layers_are_where(schedule):
    plan = Plan.from_json(planned(schedule).to_json())
    assert layers_of_stages(plan) == [range(6), range(6, 16), range(16, 26), range(26, 32)]
    assert plan.orders == planned(schedule, None).orders
    check_executable(plan, Execution.STAGES)
    check_stages_fit(plan, UNEVEN)
    for other in (None, (10, 6, 6, 10)):
        with pytest.raises(ValueError, match="the plan is for layers by stage 6,10,10,6, the job has"):
            check_stages_fit(plan, other)


def test_costs_follow_the_layers_of_each_stage():
    pieces = predict_pieces(Workload(model=MODELS["llama-7b"], seq_length=4096), HARDWARE["h100"])
    even, uneven = planned(layers=None), planned()
    costs = [costs_of_plan(pieces, plan, Recompute.NONE) for plan in (even, uneven)]
    eight, ten = (of.segments["stage1"] for of in costs)
    layer = (ten.forward - eight.forward) / 2
    assert layer * 8 == pytest.approx(eight.forward, rel=0.01)
    assert ten.bytes * 8 == pytest.approx(eight.bytes * 10, rel=1e-6)
    # The embedding and the head are at the ends.
    assert costs[1].segments["stage0"].bytes < costs[0].segments["stage0"].bytes
    weights = rank_parameters(pieces, uneven)
    assert weights[1] == weights[2] == rank_parameters(pieces, even)[1] * 10 // 8
    assert sum(weights) == sum(rank_parameters(pieces, even))
    # The stages between set the pace.
    even_ms, uneven_ms = (
        simulate(plan, of).iteration_ms for plan, of in zip((even, uneven), costs, strict=True)
    )
    assert uneven_ms > even_ms


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((8, 8, 8), "8,8,8 layers by stage are 24 layers in 3 stages; give 4 numbers that add up to 32"),
        ((8, 8, 8, 9), "are 33 layers in 4 stages"),
    ],
)
def test_numbers_that_do_not_add_up_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        planned(layers=layers)


@pytest.mark.parametrize("schedule", ["interleaved", "zb-v", "helix"])
def test_other_schedules_refuse_them(schedule):
    with pytest.raises(ValueError, match=f"--stage-layers does not apply to {schedule}; remove it"):
        planned(schedule)


@pytest.mark.parametrize("text", ["", "4,", "4,0", "4,-1", "a", "4;4", "٤,4", "9" * 9])
def test_what_is_no_list_of_layers_is_refused(text):
    with pytest.raises(ValueError, match="must be the layers of each stage, like 2,4,4,2"):
        parse_stage_layers(text)
