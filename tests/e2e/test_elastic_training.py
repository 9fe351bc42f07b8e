"""Whole jobs on documents as they are: any layout and a resumed job give the same losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import metrics_of

from helixpipe.elastic import costs_to_json, ideal_costs
from helixpipe.plan import Plan

LONGEST = 1024


def elastic_arguments(folder):
    """On a machine so small that plans must recompute."""
    costs = folder / "costs.json"
    found = ideal_costs(balanced_length=256.0, token_bytes=2600.0, input_bytes=256.0, kv_bytes=512.0)
    # Many small slices are not for free.
    found = replace(
        found, forward=replace(found.forward, layer_ms=0.1), backward=replace(found.backward, layer_ms=0.2)
    )
    costs.write_text(costs_to_json(found), encoding="utf-8")
    return [
        "--pipeline-schedule", "elastic", "--elastic-costs", costs, "--memory-limit-gib", 0.005,
        "--max-seq-length", LONGEST, "--max-position-embeddings", LONGEST, "--global-batch-size", 8,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return elastic_arguments(tmp_path_factory.mktemp("costs"))


@pytest.fixture(scope="module")
def two_stages(launch, arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    finished = launch(
        2, *arguments, "--pipeline-model-parallel-size", 2, "--metrics-jsonl", folder / "metrics.jsonl",
        "--trace-dir", folder / "trace",
    )  # fmt: skip
    assert finished.code == 0, finished.errors
    return finished, folder


def losses_of(folder):
    return [row["lm_loss"] for row in metrics_of(folder / "metrics.jsonl")]


def test_a_job_trains_and_writes_what_others_write(two_stages):
    finished, folder = two_stages
    assert f"batches of 8 documents of at most {LONGEST} tokens" in finished.output
    rows = metrics_of(folder / "metrics.jsonl")
    assert [row["schedule"] for row in rows] == ["elastic"] * 4
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"] - 0.1
    assert all(row["tokens_per_second"] > 0 and 0 <= row["bubble_ratio"] < 1 for row in rows)
    plan = Plan.from_json((folder / "trace" / "plan.json").read_text(encoding="utf-8"))
    assert plan.schedule == "elastic"
    assert plan.slices, "the longest documents are cut"


@pytest.mark.slow
def test_one_rank_gives_the_same_losses(two_stages, launch_alone, arguments, tmp_path):
    finished = launch_alone(*arguments, "--metrics-jsonl", tmp_path / "metrics.jsonl")
    assert finished.code == 0, finished.errors
    assert losses_of(tmp_path) == pytest.approx(losses_of(two_stages[1]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ("--use-distributed-optimizer", "--overlap-grad-reduce"),
        ("--pipeline-model-parallel-size", 2),
    ],
    ids=["replicas", "replicas-of-stages"],
)
def test_replicas_give_the_same_losses(two_stages, launch, arguments, tmp_path, layout):
    ranks = 4 if "--pipeline-model-parallel-size" in layout else 2
    finished = launch(ranks, *arguments, *layout, "--metrics-jsonl", tmp_path / "metrics.jsonl")
    assert finished.code == 0, finished.errors
    assert losses_of(tmp_path) == pytest.approx(losses_of(two_stages[1]), rel=1e-5)


@pytest.mark.slow
def test_a_stopped_job_goes_on_with_the_next_documents(two_stages, launch, arguments, tmp_path):
    common = [*arguments, "--pipeline-model-parallel-size", 2, "--metrics-jsonl", tmp_path / "metrics.jsonl"]
    first = launch(2, *common, "--train-iters", 2, "--save", tmp_path / "saved")
    assert first.code == 0, first.errors
    second = launch(2, *common, "--load", tmp_path / "saved")
    assert second.code == 0, second.errors
    assert losses_of(tmp_path) == pytest.approx(losses_of(two_stages[1]), rel=1e-5)
