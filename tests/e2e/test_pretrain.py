"""Whole jobs: torchrun, gloo, files. The same command under every schedule gives the same losses."""

from __future__ import annotations

import itertools
import math
import re
import sys

import pytest
from jobs import MODEL, SCHEDULES, metrics_of, run

from helixpipe.plan import Plan, ScheduleRequest, build_plan
from helixpipe.plan.simulation.timeline import Timeline

CONTRACT = {
    "iteration", "lm_loss", "grad_norm", "elapsed_ms", "tokens_per_second", "peak_memory_bytes",
    "bubble_ratio", "schedule", "attention_backend",
}  # fmt: skip
LLAMA = (
    "--swiglu --normalization RMSNorm --position-embedding-type rope --group-query-attention "
    "--num-query-groups 2 --disable-bias-linear --untie-embeddings-and-output-weights"
).split()
# A job under each takes seconds: the quick tests have Megatron's and ours.
EVERY_SCHEDULE = [
    name if name in ("1f1b", "helix") else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES
]


def column(rows, key):
    return [row[key] for row in rows]


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE[1:])
def test_schedules_train_alike(trained, schedule):
    baseline, found = trained("1f1b"), trained(schedule)
    losses = column(baseline.rows, "lm_loss")
    assert losses[-1] < losses[0] - 0.1
    # fp32 sums of the same numbers in another order.
    assert column(found.rows, "lm_loss") == pytest.approx(losses, rel=1e-5)
    assert column(found.rows, "grad_norm") == pytest.approx(column(baseline.rows, "grad_norm"), rel=1e-4)
    assert column(found.rows, "learning_rate") == column(baseline.rows, "learning_rate")
    validation = validation_losses(baseline.output)
    assert sorted(validation) == [2, 4]
    assert validation_losses(found.output) == pytest.approx(validation, rel=1e-5)


def validation_losses(output):
    """Validation loss by iteration, as printed."""
    pattern = r"^ validation loss at iteration (\d+) \| lm loss value: (\S+) \| lm loss PPL: (\S+)$"
    found = re.findall(pattern, output, flags=re.MULTILINE)
    for _, loss, perplexity in found:
        assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=1e-5)
    return {int(iteration): float(loss) for iteration, loss, _ in found}


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_metrics_keep_their_contract(trained, schedule):
    rows = trained(schedule).rows
    assert column(rows, "iteration") == [1, 2, 3, 4]
    for row in rows:
        assert set(row) >= CONTRACT
        assert row["schedule"] == schedule
        assert row["attention_backend"] == "aten-cpu"
        assert len(row["peak_memory_bytes"]) == 2
        assert all(isinstance(peak, int) and peak > 0 for peak in row["peak_memory_bytes"])
        assert 0 <= row["bubble_ratio"] < 1
        # 4 sequences of 128 tokens
        assert row["tokens_per_second"] == pytest.approx(4 * 128 / row["elapsed_ms"] * 1e3)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_terminal_shows_each_iteration_and_nothing_else(trained, schedule):
    job = trained(schedule)
    assert job.errors == ""
    defaults, first, attention, *lines, last = job.output.splitlines()
    assert defaults.startswith("not given, and another default than Megatron's: ")
    assert first.startswith(f"{schedule}: 2 ranks = tensor 1 x pipeline 2 x data 1; 4 micro batches")
    assert attention == "attention: aten-cpu"
    iterations = [line for line in lines if "validation" not in line]
    assert len(lines) == len(job.rows) + 2
    for line, row in zip(iterations, job.rows, strict=True):
        fields = [field.strip() for field in line.split("|")]
        assert fields[0].endswith(f"] iteration {row['iteration']}/4")
        assert f"consumed samples: {4 * row['iteration']}" in fields
        assert f"lm loss: {row['lm_loss']:.6E}" in fields
        assert f"grad norm: {row['grad_norm']:.3f}" in fields
        assert f"learning rate: {row['learning_rate']:.6E}" in fields
        assert f"peak memory (GiB): {max(row['peak_memory_bytes']) / 2**30:.2f}" in fields
    peaks = " ".join(r"\d+\.\d\d" for _ in range(2))
    assert re.fullmatch(rf"peak memory by rank \(GiB resident; a CPU's .* no figures\): {peaks}", last)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_trace_is_the_plan(trained, schedule):
    folder = trained(schedule).trace_folder
    virtual_stages = 2 if schedule == "interleaved" else None
    request = ScheduleRequest(num_layers=4, num_ranks=2, num_microbatches=4, virtual_stages=virtual_stages)
    plan = build_plan(schedule, request)
    assert Plan.from_json((folder / "plan.json").read_text()) == plan
    files = sorted(folder.glob("iteration_*.json"))
    assert [file.name for file in files] == [f"iteration_{number:07d}.json" for number in (1, 2, 3, 4)]
    for file in files:
        timeline = Timeline.from_json(file.read_text())
        assert timeline.segment_names == plan.segment_names
        executed = [tuple(span.operation for span in rank) for rank in timeline.spans]
        assert executed == list(plan.compute_only().orders)
        # Megatron's functions do not tell what they wait for.
        assert bool(timeline.waits) == (schedule in ("zb-h1", "helix"))
        for waits, order in zip(timeline.waits, plan.orders, strict=bool(timeline.waits)):
            assert {wait.operation for wait in waits} == {op for op in order if op.kind.is_receive}
        for rank in timeline.spans:
            assert all(earlier.end_ms <= later.start_ms for earlier, later in itertools.pairwise(rank))


@pytest.mark.slow
def test_borrowed_weights_train_alike(launch, trained, tmp_path):
    """Attention and head with weights on loan, labels on every rank."""
    metrics = tmp_path / "metrics.jsonl"
    finished = launch(
        2, "--pipeline-schedule", "helix", "--pipeline-model-parallel-size", 2, "--num-fold", 1,
        "--attention-range", "block", "--head-placement", "spread", "--metrics-jsonl", metrics,
        "--trace-dir", tmp_path, "--eval-iters", 1, "--eval-interval", 2,
    )  # fmt: skip
    assert finished.code == 0, finished.errors
    assert finished.errors == ""
    baseline, rows = trained("1f1b"), metrics_of(metrics)
    assert column(rows, "lm_loss") == pytest.approx(column(baseline.rows, "lm_loss"), rel=1e-5)
    assert column(rows, "grad_norm") == pytest.approx(column(baseline.rows, "grad_norm"), rel=1e-4)
    assert validation_losses(finished.output) == pytest.approx(validation_losses(baseline.output), rel=1e-5)
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    timeline = Timeline.from_json((tmp_path / "iteration_0000004.json").read_text())
    for waits, order in zip(timeline.waits, plan.orders, strict=True):
        assert {wait.operation for wait in waits} == {op for op in order if op.kind.is_receive}


@pytest.mark.slow
def test_bf16_trains_as_a_command(corpus, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    options = (
        "--pipeline-schedule helix --pipeline-model-parallel-size 2 --bf16 --mlp-chunk-size 50 "
        f"--loss-chunk-size auto --data-path {corpus} --metrics-jsonl {metrics}"
    )
    command = [sys.executable, "-m", "helixpipe", "train", "--nproc-per-node", "2", *MODEL, *options.split()]
    finished = run(command, timeout_s=120)
    assert finished.code == 0, finished.errors
    assert finished.errors == ""
    rows = metrics_of(metrics)
    assert all(math.isfinite(row[key]) for row in rows for key in ("lm_loss", "grad_norm"))
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"] - 0.1


@pytest.mark.slow
def test_llama_with_tensor_and_sequence_parallelism(launch, tmp_path):
    rows = {}
    for schedule in ("1f1b", "zb-h1", "helix"):
        metrics = tmp_path / f"{schedule}.jsonl"
        finished = launch(
            4, "--pipeline-schedule", schedule, "--pipeline-model-parallel-size", 2, *LLAMA,
            "--tensor-model-parallel-size", 2, "--sequence-parallel", "--use-distributed-optimizer",
            "--metrics-jsonl", metrics,
        )  # fmt: skip
        assert finished.code == 0, finished.errors
        assert finished.errors == ""
        rows[schedule] = metrics_of(metrics)
    losses = column(rows["1f1b"], "lm_loss")
    assert losses[-1] < losses[0] - 0.1
    for schedule in ("zb-h1", "helix"):
        assert column(rows[schedule], "lm_loss") == pytest.approx(losses, rel=1e-5)
    assert len(rows["helix"][0]["peak_memory_bytes"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "overlap"), [("helix", False), ("helix", True), ("zb-h1", True)])
def test_data_parallel_ranks_share_a_batch(launch, trained, tmp_path, schedule, overlap):
    metrics = tmp_path / "metrics.jsonl"
    options = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    finished = launch(
        4, "--pipeline-schedule", schedule, "--pipeline-model-parallel-size", 2, "--metrics-jsonl", metrics,
        *(options if overlap else []), *(["--num-fold", 1] if schedule == "helix" else []),
    )  # fmt: skip
    assert finished.code == 0, finished.errors
    losses = column(metrics_of(metrics), "lm_loss")
    assert losses == pytest.approx(column(trained("1f1b").rows, "lm_loss"), rel=1e-5)
