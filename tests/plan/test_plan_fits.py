"""What an execution refuses of plans that are valid in themselves."""

from dataclasses import replace

import pytest

from helixpipe.plan import Kind, Operation, ScheduleRequest, build_plan
from helixpipe.plan.execution import Execution
from helixpipe.plan.fit import check_executable, check_fits, stages_follow_ranks
from helixpipe.plan.schedules import SCHEDULES, planned_ahead


def planned(schedule, **options):
    return build_plan(schedule, ScheduleRequest(num_layers=4, num_ranks=2, num_microbatches=8, **options))


def placed(plan, segment, micro_batch, rank):
    """The plan with one computation on another rank."""
    placement = [list(row) for row in plan.placement]
    placement[segment][micro_batch] = rank
    return replace(plan, placement=tuple(map(tuple, placement)))


OPTIONS = {
    "helix": [
        {"attention_range": cut, "head_placement": head, "num_fold": fold}
        for cut in ("core", "qkv", "block")
        for head in ("first", "spread")
        for fold in (1, 2)
    ]
}


@pytest.mark.parametrize(
    "name", [n for n, entry in SCHEDULES.items() if entry.execution and entry.plans_ahead]
)
def test_what_a_schedule_plans_can_be_executed(name):
    for options in OPTIONS.get(name, [{}]):
        check_executable(planned(name, **options), SCHEDULES[name].execution)


HELIX, BLOCK = planned("helix"), planned("helix", attention_range="block")
SLICED = planned("seq1f1b")
SPREAD = planned("helix", head_placement="spread")
REFUSED = {
    "an evaluation": (planned("gpipe").forward_only(), Execution.STAGES, "has no backward pass"),
    "slices": (planned("seq1f1b"), Execution.STAGES, "cuts sequences into slices"),
    "no slices": (planned("gpipe"), Execution.SLICES, "does not cut all sequences into as many slices"),
    "other slices in a sequence": (
        replace(SLICED, slices=(SLICED.slices[0][:2], SLICED.slices[0][2:], *SLICED.slices[1:])),
        Execution.SLICES,
        "does not cut all sequences into as many slices",
    ),
    "slices with W": (
        SLICED.with_orders((*order, Operation(rank, Kind.W, 0)) for rank, order in enumerate(SLICED.orders)),
        Execution.SLICES,
        "computes weight gradients apart",
    ),
    "slices on turned stages": (
        replace(SLICED, placement=SLICED.placement[::-1]),
        Execution.SLICES,
        "does not have stage r alone on rank r",
    ),
    "a stage on two ranks": (
        placed(planned("gpipe"), 0, 3, 1),
        Execution.STAGES,
        "segment 0 is placed on 2 ranks",
    ),
    "ranks without a stage": (
        replace(planned("gpipe"), placement=((0,) * 8, (0,) * 8)),
        Execution.STAGES,
        "4 layers in 2 segments on 2 ranks are not shared out evenly",
    ),
    "layers that do not divide": (
        replace(planned("gpipe"), parameters={"num_layers": 5}),
        Execution.STAGES,
        "5 layers in 2 segments",
    ),
    "loans of stages": (BLOCK, Execution.STAGES, "lends weights, which whole layers do not"),
    "stages as segments": (planned("zb-h1"), Execution.SEGMENTS, "cut at their attention are not"),
    "other segments": (
        planned("gpipe"),
        Execution.SEGMENTS,
        "4 layers cut at their attention are not 2 segments",
    ),
    "a range without its loans": (
        replace(HELIX, parameters={**HELIX.parameters, "attention_range": "qkv"}),
        Execution.SEGMENTS,
        r"segment 1 of micro batch 2 is placed on rank 0, its weights|segment 1 of micro batch \d",
    ),
    "loans of attention alone": (
        replace(BLOCK, parameters={**BLOCK.parameters, "attention_range": "core"}),
        Execution.SEGMENTS,
        "segment 1, attention alone, has no weights to lend",
    ),
    "a segment away from its weights": (
        placed(HELIX, 2, 5, 0),
        Execution.SEGMENTS,
        "segment 2 of micro batch 5 is placed on rank 0, its weights are on rank 1; place it there or lend",
    ),
    "a head away from its weights": (
        replace(SPREAD, loans=()),
        Execution.SEGMENTS,
        "segment 8 of micro batch 2 is placed on rank 1, its weights are on rank 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_executed_is_refused(name):
    plan, execution, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        check_executable(plan, execution)
    assert "\n" not in str(caught.value)


def test_data_is_read_in_order():
    plan = planned("gpipe")
    orders = [
        [op._replace(micro_batch={0: 1, 1: 0}.get(op.micro_batch, op.micro_batch)) for op in order]
        for order in plan.orders
    ]
    with pytest.raises(ValueError, match=r"segment 0 runs micro batches in the order \[1, 0, 2"):
        check_executable(plan.with_orders(orders), Execution.STAGES)


def test_a_plan_is_for_one_size_of_job():
    plan = planned("1f1b")
    check_fits(plan, num_layers=4, num_ranks=2, num_microbatches=8)
    for change, words in (
        ({"num_layers": 8}, "4 layers .* the job has 8"),
        ({"num_ranks": 4}, "2 pipeline ranks .* the job has 4"),
        ({"num_microbatches": 4}, "8 micro batches .* the job has 4"),
    ):
        with pytest.raises(ValueError, match=words):
            check_fits(plan, **{"num_layers": 4, "num_ranks": 2, "num_microbatches": 8, **change})


def test_data_is_read_by_sequences():
    request = ScheduleRequest(num_layers=6, num_ranks=3, num_microbatches=4, num_slices=5)
    plan = build_plan("seq1f1b", request)
    assert (plan.num_microbatches, plan.num_sequences) == (20, 4)
    assert [plan.read_by(rank) for rank in range(3)] == [(0, 1, 2, 3), (), (0, 1, 2, 3)]
    check_fits(plan, num_layers=6, num_ranks=3, num_microbatches=4)


def test_who_reads_and_who_has_losses_follows_from_the_plan():
    everything = tuple(range(8))

    def found(plan):
        return [(plan.read_by(rank), plan.losses_of(rank)) for rank in (0, 1)]

    assert found(planned("1f1b")) == [(everything, ()), (everything, everything)]
    assert found(HELIX) == found(planned("zb-v")) == [(everything, everything), ((), ())]
    assert found(SPREAD) == [(everything, (0, 1, 4, 5)), ((2, 3, 6, 7), (2, 3, 6, 7))]


def test_stages_follow_ranks_only_where_each_rank_has_its_own():
    assert stages_follow_ranks(planned("1f1b"))
    assert not stages_follow_ranks(planned("zb-v"))
    assert not stages_follow_ranks(replace(planned("1f1b"), placement=((1,) * 8, (0,) * 8)))


@pytest.mark.parametrize("name", planned_ahead())
def test_the_registry_says_whose_plans_have_weight_gradients_apart(name):
    assert planned(name).splits_backward == SCHEDULES[name].splits_backward
