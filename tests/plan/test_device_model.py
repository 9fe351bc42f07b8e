"""What NCCL and CUDA do with plans: every schedule passes, and what would hang is caught."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moved_receives import one_place_off, posted_ahead

from helixpipe.plan import Plan, PlanError, ScheduleRequest, build_plan, validate
from helixpipe.plan.device_model import DEVICE_MODELS, find_stall
from helixpipe.plan.lower import lower
from helixpipe.plan.plan import orders_from_csv
from helixpipe.plan.schedules import SCHEDULES, planned_ahead
from helixpipe.plan.simulation.costs import Costs, SegmentCost

every_model = pytest.mark.parametrize("model", DEVICE_MODELS, ids=lambda model: model.name)
MANY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


INTERLOCKED = {"round_order": "interlocked"}


def plan_of(schedule, p, m, layers=None, **options):
    request = ScheduleRequest(num_ranks=p, num_layers=layers or 2 * p, num_microbatches=m, **options)
    return build_plan(schedule, request)


@st.composite
def plans(draw, most_ranks=16):
    schedule, p = draw(st.sampled_from(sorted(planned_ahead()))), draw(st.integers(2, most_ranks))
    rounds = draw(st.integers(1, 2 if p < 9 else 1))
    if schedule == "interleaved":
        return plan_of(schedule, p, p * rounds)
    if "num_fold" not in SCHEDULES[schedule].options:
        return plan_of(schedule, p, draw(st.integers(1, p + 3)))
    fold = draw(st.integers(1, 2))
    if "round_order" not in SCHEDULES[schedule].options:
        return plan_of(schedule, p, 1, layers=p, num_fold=fold)
    return plan_of(
        schedule,
        p,
        p * fold * rounds,
        layers=p * draw(st.integers(1, 2 if p < 9 else 1)),
        num_fold=fold,
        attention_range=draw(st.sampled_from(["core", "qkv", "block"])),
        head_placement=draw(st.sampled_from(["first", "spread"])),
        **draw(st.sampled_from([{}, INTERLOCKED, INTERLOCKED | {"split_weight_gradients": True}])),
    )


@MANY
@given(plans())
def test_every_schedule_passes_every_model(plan):
    for model in DEVICE_MODELS:
        assert find_stall(plan, model) == {}, model.name
        assert find_stall(plan.forward_only(), model) == {}, model.name


@MANY
@given(plans(most_ranks=5), st.data())
def test_receives_placed_with_any_costs_pass_every_model(plan, data):
    time = st.integers(0, 20)
    costs = Costs(
        {name: SegmentCost(data.draw(time), data.draw(time), data.draw(time)) for name in plan.cost_names},
        {"*": data.draw(time)},
    )
    lowered = lower(plan.compute_only(), costs)
    validate(lowered)
    for model in DEVICE_MODELS:
        assert find_stall(lowered, model) == {}, model.name


HELIX = {"num_fold": 2, "attention_range": "block", "head_placement": "spread"}


@pytest.mark.parametrize(
    ("schedule", "options"),
    [("1f1b", {}), ("zb-h1", {}), ("helix", {}), ("helix", HELIX)],
    ids=["1f1b", "zb-h1", "helix", "helix-block-spread"],
)
@pytest.mark.parametrize("p", [2, 4])
def test_receives_posted_four_operations_ahead_hang(schedule, options, p):
    """As the executor posted them when posting was not yet the plan's."""
    plan = posted_ahead(plan_of(schedule, p, 4 * p, **options), 4)
    hanging = [model for model in DEVICE_MODELS if find_stall(plan, model)]
    assert DEVICE_MODELS[0] in hanging
    assert DEVICE_MODELS[-1] in hanging, "connections made at the first message"
    with pytest.raises(PlanError, match="deadlock"):
        validate(plan)


@pytest.mark.parametrize(
    "plan", [plan_of("1f1b", 3, 4, 3), plan_of("zb-v", 2, 3), plan_of("helix", 2, 4, 2, **HELIX)],
    ids=lambda plan: plan.schedule,
)  # fmt: skip
def test_the_validator_catches_what_the_strictest_model_hangs_on(plan):
    hanging = 0
    for changed in one_place_off(plan):
        stalls = [find_stall(changed, model) for model in DEVICE_MODELS]
        if any(stalls):
            hanging += 1
            # What the strictest lets pass, all let pass.
            assert stalls[0]
            with pytest.raises(PlanError):
                validate(changed)
    assert hanging > 2


@MANY
@given(plans(most_ranks=4), st.data())
def test_the_first_model_is_the_strictest(plan, data):
    """Also of plans in which several receives are far from where they were."""
    orders = [list(order) for order in plan.orders]
    for _ in range(data.draw(st.integers(1, 4))):
        rank = data.draw(st.integers(0, plan.num_ranks - 1))
        order = orders[rank]
        place = st.integers(0, len(order) - 1)
        order.insert(data.draw(place), order.pop(data.draw(place)))
    changed = plan.with_orders(orders)
    if not find_stall(changed, DEVICE_MODELS[0]):
        for model in DEVICE_MODELS[1:]:
            assert not find_stall(changed, model), model.name


def by_hand(*orders):
    """Two segments on two ranks, in opposite directions for micro batches 0 and 1."""
    placement = ((0, 1), (1, 0))
    text = "\n".join(order.replace(" ", ",") for order in orders)
    return Plan("by hand", 2, 2, ("a", "b"), placement, orders_from_csv(text))


@every_model
def test_results_exchanged_after_posts_that_do_not_wait_for_them(model):
    """Both ranks post, compute and send: only with a queue for each stream do sends get past the posts."""
    plan = by_hand(
        "0RECV_F1@1 0F0 0SEND_F0@1 1F1",
        "0RECV_F0@0 0F1 0SEND_F1@0 1F0",
    )
    few = model.num_queues == 1 or model.connects_lazily
    assert find_stall(plan, model) == ({0: 0, 1: 0} if few else {})


@every_model
def test_results_exchanged_in_turn_pass(model):
    plan = by_hand("0F0 0SEND_F0@1 0RECV_F1@1 1F1", "0F1 0RECV_F0@0 0SEND_F1@0 1F0")
    assert find_stall(plan, model) == {}


def test_one_stream_for_a_direction_holds_up_what_pair_streams_do_not():
    """Rank 1 takes from 0 before it sends to 2, in one stream; rank 2 must hear from 1 before 0 goes on."""
    text = "0RECV_F1@2,1F1,0F0,0SEND_F0@1", "0F2,0RECV_F0@0,0SEND_F2@2,1F0", "0F1,0RECV_F2@1,1F2,0SEND_F1@0"
    plan = Plan("by hand", 3, 3, ("a", "b"), ((0, 2, 1), (1, 0, 2)), orders_from_csv("\n".join(text)))
    stalls = {model.name: bool(find_stall(plan, model)) for model in DEVICE_MODELS}
    assert not stalls["32 hardware queues"]
    assert stalls["one stream per communicator"]
