"""What is told of the plans of elastic iterations."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from job_settings import job_settings
from planning import LENGTHS, make_job

from helixpipe.elastic import plan_batch
from helixpipe.elastic.service.background import PlannedBatch
from megatron.pretrain.metrics import IterationMetrics, Planning, Reporter, iteration_line


@pytest.fixture
def settings(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "1")
    return job_settings(f"--train-iters 9 --global-batch-size 12 --metrics-jsonl {tmp_path}/metrics")


def metrics(iteration, planning):
    return IterationMetrics(
        iteration=iteration,
        consumed_samples=12 * iteration,
        lm_loss=1.5,
        grad_norm=0.1,
        elapsed_ms=20.0,
        tokens_per_second=100.0,
        peak_memory_bytes=[1, 2],
        bubble_ratio=0.1,
        schedule="elastic",
        attention_backend="aten-cpu",
        learning_rate=1e-3,
        pipeline_ms=15.25,
        planning=planning,
    )


def test_a_plan_is_told(settings):
    plan = plan_batch(LENGTHS, make_job(3), slice_counts=[8])
    told = Planning.of(PlannedBatch(plan, 0.5, 0.25, "late"))
    assert told == (
        plan.prediction.time_ms, len(plan.recipe.chunks), len(plan.recipe.pipelines), 8, 0.5, 0.25, True
    )  # fmt: skip
    row = json.loads(metrics(1, told).to_json())
    assert {key: row[key] for key in told._fields} == told._asdict()
    assert row["pipeline_ms"] == 15.25
    assert "planning" not in row
    line = iteration_line(metrics(1, told), settings)
    assert f"| slices: 8 | predicted (ms): {told.predicted_ms:.1f} | measured (ms): 15.2 |" in line
    assert line.endswith("| planning (s): 0.50 | waited (s): 0.25")
    silent = replace(settings, output=replace(settings.output, metrics_jsonl=None))
    assert "measured (ms): n/a" in iteration_line(metrics(1, told), silent)


def test_other_schedules_have_no_plan_to_tell(settings):
    assert not set(json.loads(metrics(1, None).to_json())) & {"planning", *Planning._fields}
    assert "planning" not in iteration_line(metrics(1, None), settings)


def test_replicas_wait_for_the_slowest():
    rows = [(10.0, 5.0, 1.0, 2.0, 0.5, 0.1, 0.0), (12.0, 7.0, 2.0, 4.0, 0.3, 0.2, 1.0)]
    assert Planning.over_ranks(rows) == (12.0, 7, 2, 4, 0.5, 0.2, True)
    assert Planning.over_ranks(rows[:1]) == (10.0, 5, 1, 2, 0.5, 0.1, False)


def test_a_job_ends_with_what_planning_took(capsys, settings):
    reporter = Reporter(settings, 0)
    reporter.say(reporter.planning_summary())
    assert capsys.readouterr().out == ""
    for iteration, seconds in enumerate((1.0, 0.5, 0.3), start=1):
        reporter.report(metrics(iteration, Planning(10.0, 5, 1, 2, seconds, seconds / 10, iteration == 2)))
    assert reporter.planning_summary() == (
        "planning took 1.00 s for the first batch, waited for 0.10 s, and 0.80 s for the other 2, waited for "
        "0.08 s; quick plans instead of late ones: 1"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_speaks(capsys, settings, rank):
    its = replace(settings, parallel=replace(settings.parallel, rank=rank))
    Reporter(its, 0).report(metrics(1, Planning(1.0, 1, 1, 1, 1.0, 1.0, False)))
    assert bool(capsys.readouterr().out) == (rank == 0)
