"""What a plan needs of each link, by hand for a small one."""

from __future__ import annotations

from dataclasses import replace

from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.plan.cost_model import HARDWARE, MODELS, Recompute, Workload, costs_of_plan, predict_pieces
from helixpipe.plan.simulation.costs import Costs, SegmentCost, uniform_costs
from helixpipe.plan.simulation.link_needs import LinkNeed, link_needs

FORWARD, BACKWARD = 3.0, 5.0


def plan_of(schedule, ranks, layers, **options):
    return build_plan(
        schedule, ScheduleRequest(num_layers=layers, num_ranks=ranks, num_microbatches=8, **options)
    )


def test_activations_and_gradients_of_a_stage():
    plan = plan_of("1f1b", 3, 3)
    costs = Costs(dict.fromkeys(plan.cost_names, SegmentCost(FORWARD, BACKWARD)), {}, {"*": 1000})
    assert link_needs(plan, costs) == {
        (0, 1): LinkNeed(1000, FORWARD), (1, 2): LinkNeed(1000, FORWARD),
        (2, 1): LinkNeed(1000, BACKWARD), (1, 0): LinkNeed(1000, BACKWARD),
    }  # fmt: skip


def test_a_backward_that_is_split_hides_less():
    costs = {"*": 1000}
    for schedule, hidden_by in (("1f1b", 5.0), ("zb-h1", 3.0)):
        plan = plan_of(schedule, 2, 2)
        segments = dict.fromkeys(plan.cost_names, SegmentCost(1.0, 3.0, weight=2.0))
        assert link_needs(plan, Costs(segments, {}, costs))[1, 0] == LinkNeed(1000, hidden_by)


def test_the_message_with_the_least_time_per_byte_counts():
    plan = plan_of("helix", 2, 2)
    segments = dict.fromkeys(plan.cost_names, SegmentCost(10.0, 20.0))
    segments["attention"] = SegmentCost(2.0, 20.0)
    needs = link_needs(plan, Costs(segments, {}, {"*": 1000}))
    assert needs[0, 1] == needs[1, 0] == LinkNeed(1000, 2.0)


def test_every_pair_that_sends_has_a_need():
    plan = plan_of("helix", 4, 8, attention_range="block")
    model = replace(MODELS["llama-7b"], num_layers=8)
    workload = Workload(model=model, seq_length=4096, tensor_parallel=8)
    pieces = predict_pieces(workload, HARDWARE["h20"])
    needs = link_needs(plan, costs_of_plan(pieces, plan, Recompute.NONE))
    sent = {
        (rank, op.peer)
        for rank, order in enumerate(plan.orders)
        for op in order
        if op.kind.value in ("SEND_F", "SEND_B")
    }
    assert set(needs) == sent
    # The hidden state of one micro batch in bf16.
    assert {need.num_bytes for need in needs.values()} == {4096 * 4096 * 2}


def test_unknown_sizes_are_no_need():
    plan = plan_of("1f1b", 2, 2)
    assert link_needs(plan, uniform_costs(plan)) == {}
