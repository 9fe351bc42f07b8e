"""``--profile``: torch's profiler around some iterations, with the plan's operations in its trace."""

import json

import pytest
from ranks import run_on_ranks
from training_worker import Fault, run_cases, small_model

from helixpipe.data.prefix import DatasetInfo
from helixpipe.plan import ScheduleRequest, build_plan
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.profiling import ProfilingSettings

LINE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 4 --train-iters 20 --lr 1e-3 --data-path unused"
)
DATASET = DatasetInfo("unused", 300, 0, 100, 10_000, 500)


@pytest.fixture
def parse(monkeypatch, tmp_path):
    def parse(words, rank=0):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        return parse_arguments(f"{LINE} {words.format(dir=tmp_path)}".split(), DATASET).profiling

    return parse


def test_megatrons_defaults(parse, tmp_path):
    assert parse("") is None
    assert parse("--profile --trace-dir {dir}") == ProfilingSettings(11, 12, tmp_path)
    assert parse("--profile --trace-dir {dir}", rank=1) is None


def test_iterations_and_ranks_are_chosen(parse, tmp_path):
    words = "--profile --trace-dir {dir} --profile-step-start 0 --profile-step-end 3 --profile-ranks 0 1"
    assert parse(words, rank=1) == ProfilingSettings(1, 3, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--profile", "--profile needs --trace-dir DIR"),
        ("--profile-step-end 3", "--profile-step-end needs --profile"),
        (
            "--profile --trace-dir {dir} --profile-step-start 12",
            "must be below --profile-step-end 12; use at most 11",
        ),
        ("--profile --trace-dir {dir} --profile-step-end 21", "is beyond --train-iters 20"),
        ("--profile --trace-dir {dir} --profile-ranks 0 2", "--profile-ranks 2: the job has ranks 0 to 1"),
    ],
)
def test_what_would_be_ignored_is_refused(parse, words, message):
    with pytest.raises(ValueError, match=message):
        parse(words)


def operations_of(path, plan, rank, compute_only):
    """Text forms in a rank's trace by start, and those that the plan has."""
    wanted = [str(op) for op in plan.orders[rank] if op.kind.is_compute or not compute_only]
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    known = {str(op) for order in plan.orders for op in order}
    found = [e for e in events if e.get("name") in known and e.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(found, key=lambda event: event["ts"])], wanted


def test_traces_show_the_plan(tmp_path):
    """Also where Megatron's own functions run it, which tell only of what they compute."""
    runs = {"helix": False, "1f1b": True}
    cases = [
        (
            f"--pipeline-schedule {name} --profile --profile-step-start 1 --profile-step-end 2 "
            f"--profile-ranks 0 1 --trace-dir {tmp_path / name}",
            Fault(),
        )
        for name in runs
    ]
    common = f"{small_model(tmp_path)} --pipeline-model-parallel-size 2"
    finished = run_on_ranks(2, run_cases, cases, 1, 2, common)
    assert [run["error"] for rank in finished for run in rank] == [""] * 4
    for name, compute_only in runs.items():
        plan = build_plan(name, ScheduleRequest(num_layers=4, num_ranks=2, num_microbatches=4))
        for rank in (0, 1):
            path = tmp_path / name / f"profile_rank{rank}.json"
            found, wanted = operations_of(path, plan, rank, compute_only)
            assert found == wanted, (name, rank)
