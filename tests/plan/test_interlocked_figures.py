"""What interlocked rounds promise: GPT 7B at 128k on 64 H20, tensor 8 x pipeline 8, `block`, spread head."""

from dataclasses import replace

import pytest

from helixpipe.plan import ScheduleRequest, validate
from helixpipe.plan.advise.advice import efficiency
from helixpipe.plan.cost_model import HARDWARE, MODELS, Recompute, Workload, costs_of_plan, predict_pieces
from helixpipe.plan.formulas import interlocked_idle
from helixpipe.plan.lower import lower
from helixpipe.plan.schedules import SCHEDULES
from helixpipe.plan.schedules.request import KnownCosts
from helixpipe.plan.simulation.simulate import simulate

slow = pytest.mark.slow
GIB = 2**30


def planned(m, recompute, *, splits=False, layers=32, p=8):
    """The plan and its costs."""
    model = replace(MODELS["gpt-7b"], num_layers=layers)
    pieces = predict_pieces(Workload(model=model, seq_length=131072, tensor_parallel=8), HARDWARE["h20"])
    request = ScheduleRequest(
        num_layers=layers,
        num_ranks=p,
        num_microbatches=m,
        num_fold=1,
        attention_range="block",
        head_placement="spread",
        round_order="interlocked",
        split_weight_gradients=splits or None,
        costs=KnownCosts(lambda plan: costs_of_plan(pieces, plan, recompute)),
    )
    plan = SCHEDULES["helix"].plan(request)
    return plan, costs_of_plan(pieces, plan, recompute)


def closed_form(plan, costs):
    first, middle = (costs.segments[name] for name in ("first", "middle"))
    return interlocked_idle(
        plan.num_ranks,
        plan.num_segments // 2,
        middle.forward + middle.backward + middle.weight,
        first.forward + first.backward + first.weight,
        costs.network.transfer_ms(costs.num_bytes("first", "attention"), 0, 1),
    )


@pytest.mark.parametrize(("m", "least"), [(16, 0.978), pytest.param(32, 0.986, marks=slow)])
def test_efficiency_with_weight_gradients_apart_and_products_kept(m, least):
    plan, costs = planned(m, Recompute.PRODUCTS, splits=True)
    assert efficiency(plan, costs) >= least
    assert max(simulate(plan, costs).peak_bytes) <= 60 * GIB


@pytest.mark.parametrize(("m", "most"), [(16, 46755.5), pytest.param(32, 92048, marks=slow)])
def test_idle_time_of_the_busiest_rank_is_the_closed_form_whatever_the_rounds(m, most):
    plan, costs = planned(m, Recompute.NONE)
    timeline = simulate(plan, costs).timeline
    assert timeline.makespan_ms <= most
    assert timeline.makespan_ms - max(timeline.busy_ms) == pytest.approx(closed_form(plan, costs), abs=1)


@slow
@pytest.mark.parametrize(
    ("m", "layers", "least"), [(20, 32, 0.93), (36, 32, 0.96), (16, 30, 0.97), (32, 30, 0.97)]
)
def test_sizes_that_do_not_divide_cost_little(m, layers, least):
    plan, costs = planned(m, Recompute.PRODUCTS, splits=True, layers=layers)
    assert efficiency(plan, costs) >= least
    validate(lower(plan))


def test_four_ranks_have_the_closed_form_too():
    plan, costs = planned(8, Recompute.NONE, layers=16, p=4)
    timeline = simulate(plan, costs).timeline
    assert timeline.makespan_ms - max(timeline.busy_ms) == pytest.approx(closed_form(plan, costs), abs=1)
