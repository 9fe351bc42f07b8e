"""One plan from parsing to execution: the object that was validated, also one that comes from a file."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_worker import train_and_watch
from ranks import run_on_ranks
from training_worker import small_model

from helixpipe.data.prefix import DatasetInfo
from helixpipe.plan import Plan, ScheduleRequest, build_plan
from helixpipe.plan.build import complete
from helixpipe.plan.cost_model import Recompute
from helixpipe.plan.execution import Execution
from helixpipe.plan.slice_ends import slice_ends, with_slice_ends
from megatron.pretrain.health.agreement import fingerprint
from megatron.pretrain.settings.arguments import parse_arguments

LINE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 4 --train-iters 10 --lr 1e-3 --data-path unused --pipeline-model-parallel-size 2"
)
DATASET = DatasetInfo("unused", 300, 0, 100, 10_000, 500)


def planned(schedule, **options):
    return build_plan(schedule, ScheduleRequest(num_layers=4, num_ranks=2, num_microbatches=4, **options))


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """``parse(plan, words)``: with a plan, or its text, as ``--plan``."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")

    def parse(plan, words=""):
        path = tmp_path / "plan.json"
        path.write_text(plan.to_json() if isinstance(plan, Plan) else plan, encoding="utf-8")
        return parse_arguments(f"{LINE} --plan {path} {words}".split(), DATASET)

    return parse


def reordered(plan, schedule="1f1b"):
    """GPipe's order under another name: an order that this schedule does not have."""
    return replace(planned("gpipe"), schedule=schedule, parameters=plan.parameters)


def test_the_plan_of_a_file_is_the_jobs(parse):
    plan = planned("helix", attention_range="block", head_placement="spread", num_fold=1)
    settings = parse(plan)
    assert settings.schedule.plan == plan
    assert (settings.schedule.name, settings.schedule.execution) == ("helix", Execution.SEGMENTS)
    assert settings.memory.memory_saving.recompute is Recompute.WITHOUT_ATTENTION, "helix does so by itself"


def test_messages_are_added_to_a_plan_without_them(parse):
    plan = planned("zb-h1")
    assert parse(plan.compute_only()).schedule.plan == plan


def test_megatrons_functions_run_only_their_own_order(parse):
    assert parse(planned("1f1b")).schedule.execution is Execution.MEGATRON
    assert parse(reordered(planned("1f1b"))).schedule.execution is Execution.STAGES
    virtual = planned("interleaved", virtual_stages=2)
    assert parse(virtual).schedule.virtual_stages == 2
    assert parse(virtual.compute_only()).schedule.execution is Execution.MEGATRON


def test_a_plan_keeps_the_slices_it_says_and_gets_those_it_does_not(parse):
    plan = with_slice_ends(planned("seq1f1b", num_slices=2), (24, 32))
    assert parse(plan).schedule.plan == plan
    settings = parse(planned("seq1f1b", num_slices=2))
    assert settings.schedule.execution is Execution.SLICES
    first, end = slice_ends(settings.schedule.plan)
    assert 16 <= first < 32 == end


def test_a_plan_of_sliced_helix_is_cut_where_forwards_take_equally_long(parse):
    plan = planned("sliced-helix", num_fold=2)
    settings = parse(plan)
    assert settings.schedule.execution is Execution.SLICED_SEGMENTS
    assert settings.memory.memory_saving.recompute is Recompute.WITHOUT_ATTENTION
    ends = slice_ends(settings.schedule.plan)
    assert len(ends) == 4
    assert (
        parse(with_slice_ends(plan, (10, 20, 30, 32))).schedule.plan.parameters["slice_ends"] == "10,20,30,32"
    )


def renamed_range(plan, name):
    return replace(plan, parameters={**plan.parameters, "attention_range": name})


def test_ranks_compare_the_plans_of_their_files(parse):
    one, other = fingerprint(parse(planned("gpipe"))), fingerprint(parse(reordered(planned("1f1b"), "gpipe")))
    assert one == other
    other = fingerprint(parse(replace(planned("1f1b"), schedule="gpipe")))
    assert {name for name, value in one.items() if other[name] != value} == {"plan"}


def backwards_in_data(plan):
    """Micro batch 1 before micro batch 0."""
    swap = {0: 1, 1: 0}
    return complete(
        plan.compute_only().with_orders(
            [op._replace(micro_batch=swap.get(op.micro_batch, op.micro_batch)) for op in order]
            for order in plan.compute_only().orders
        )
    )


REFUSED = {
    "slices with a range of two segments in three": (
        lambda: renamed_range(planned("sliced-helix", attention_range="block"), "core"),
        "",
        "4 layers cut at their attention are not 13 segments",
    ),
    "a context said twice": (
        lambda: planned("sliced-helix"),
        "--resend-context",
        "does not apply with --plan FILE",
    ),
    "slices of another schedule": (
        lambda: replace(planned("sliced-helix"), schedule="helix"),
        "",
        "cuts sequences into slices, which only schedules of slices execute",
    ),
    "ranks": (
        lambda: build_plan("1f1b", ScheduleRequest(num_layers=4, num_ranks=4, num_microbatches=4)),
        "",
        r"is for 4 pipeline ranks \(--pipeline-model-parallel-size\), the job has 2",
    ),
    "layers": (
        lambda: build_plan("1f1b", ScheduleRequest(num_layers=8, num_ranks=2, num_microbatches=4)),
        "",
        r"is for 8 layers \(--num-layers\), the job has 4",
    ),
    "micro batches": (
        lambda: planned("1f1b"),
        "--global-batch-size 8",
        r"is for 4 micro batches \(.*\), the job has 8",
    ),
    "an option of the plan": (
        lambda: planned("helix"),
        "--num-fold 1",
        "--num-fold does not apply with --plan FILE, which says it; remove it",
    ),
    "the schedule": (
        lambda: planned("helix"),
        "--pipeline-schedule helix",
        "--pipeline-schedule does not apply",
    ),
    "no plan": (lambda: "{}", "", '--plan .*plan.json: not a plan: "format" must be'),
    "an unknown schedule": (
        lambda: replace(planned("1f1b"), schedule="2f2b"),
        "",
        "unknown schedule '2f2b'; known: gpipe, 1f1b",
    ),
    "a plan of one batch": (
        lambda: replace(planned("1f1b"), schedule="elastic"),
        "",
        "plans every batch anew",
    ),
    "slices of other sequences": (
        lambda: with_slice_ends(planned("seq1f1b", num_slices=2), (40, 64)),
        "",
        r"cuts sequences of 64 tokens, the job's have 32 \(--seq-length\)",
    ),
    "slices that do not rise": (
        lambda: with_slice_ends(planned("seq1f1b", num_slices=3), (20, 20, 32)),
        "",
        "\"slice_ends\" is '20,20,32'; it must be 3 rising numbers of tokens",
    ),
    "slices of a number": (
        lambda: planned("seq1f1b", num_slices=2),
        "--num-slices 4",
        "--num-slices does not apply with --plan FILE",
    ),
    "a missing operation": (
        lambda: planned("gpipe").with_orders(order[:-1] for order in planned("gpipe").orders),
        "",
        "is missing from rank",
    ),
    "an evaluation": (lambda: planned("gpipe").forward_only(), "", "has no backward pass"),
    "data out of order": (
        lambda: backwards_in_data(planned("gpipe")),
        "",
        r"segment 0 runs micro batches in the order \[1, 0, 2, 3\]",
    ),
    "a range that does not exist": (
        lambda: replace(planned("helix"), parameters={"num_layers": 4, "attention_range": "all"}),
        "",
        "\"attention_range\" is 'all'; it must be one of core, qkv, block",
    ),
    "tied weights of two stages": (
        lambda: planned("zb-v"),
        "",
        "add --untie-embeddings-and-output-weights",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(parse, name):
    make, words, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        parse(make(), words)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(parse, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"--plan .*none.json: cannot be read \(No such file"):
        parse_arguments(f"{LINE} --plan {tmp_path}/none.json".split(), DATASET)


def test_training_executes_the_plan_that_parsing_validated(tmp_path):
    edited, helix = tmp_path / "edited.json", tmp_path / "helix.json"
    edited.write_text(reordered(planned("1f1b")).to_json(), encoding="utf-8")
    helix.write_text(planned("helix", num_fold=1).compute_only().to_json(), encoding="utf-8")
    runs = {
        "1f1b": "--pipeline-schedule 1f1b",
        "zb-h1": "--pipeline-schedule zb-h1",
        "helix": "--pipeline-schedule helix",
        "auto": "--pipeline-schedule auto --hardware h20",
        "range": "--pipeline-schedule helix --attention-range auto",
        "edited": f"--plan {edited}",
        "file": f"--plan {helix}",
    }
    common = f"{small_model(tmp_path)} --eval-iters 1 --split 3,1,1"
    first, second = run_on_ranks(2, train_and_watch, tmp_path, common, runs)
    losses = first["1f1b"]["losses"]
    assert len(losses) == 3
    for name in runs:
        for rank in (first, second):
            assert (rank[name]["code"], rank[name]["error"]) == (0, "")
            assert rank[name]["seen"] == [True, True, True], f"{name} executes another plan"
            assert rank[name]["evaluated"], f"{name} evaluates by another plan"
        # fp32 sums of the same numbers in another order.
        assert first[name]["losses"] == pytest.approx(losses, rel=1e-5)
