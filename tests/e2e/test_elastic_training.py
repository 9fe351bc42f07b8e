"""Whole jobs on documents as they are: any layout and a resumed job give the same losses."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from elastic_checkpoint import megatrons_mean_loss, refusals
from jobs import MODEL, metrics_of
from ranks import run_on_ranks

from helixpipe.data.prefix import inspect_prefix
from helixpipe.elastic import costs_to_json, ideal_costs
from helixpipe.plan import Plan

LONGEST = 512
BATCH = 8
SPLIT = ("--split", "8,2,1")
EVALUATED = ("--eval-iters", 2, "--eval-interval", 2)


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
        "--pipeline-schedule", "elastic", "--elastic-costs", costs, "--memory-limit-gib", 0.0025,
        "--max-seq-length", LONGEST, "--max-position-embeddings", LONGEST, "--global-batch-size", BATCH,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return elastic_arguments(tmp_path_factory.mktemp("costs"))


@pytest.fixture(scope="module")
def two_stages(launch, arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    finished = launch(
        2, *arguments, "--pipeline-model-parallel-size", 2, "--metrics-jsonl", folder / "metrics.jsonl",
        "--trace-dir", folder / "trace", *SPLIT, *EVALUATED,
        "--save", folder / "saved",
    )  # fmt: skip
    assert finished.code == 0, finished.errors
    return finished, folder


def losses_of(folder):
    return [row["lm_loss"] for row in metrics_of(folder / "metrics.jsonl")]


def validation_losses(finished):
    found = re.findall(r"validation loss at iteration \d+ \| lm loss value: (\S+)", finished.output)
    return [float(loss) for loss in found]


def test_a_job_trains_and_writes_what_others_write(two_stages):
    finished, folder = two_stages
    assert f"batches of 8 documents of at most {LONGEST} tokens" in finished.output
    rows = metrics_of(folder / "metrics.jsonl")
    assert [row["schedule"] for row in rows] == ["elastic"] * 4
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"] - 0.1
    assert all(row["tokens_per_second"] > 0 and 0 <= row["bubble_ratio"] < 1 for row in rows)
    plan = Plan.from_json((folder / "trace" / "plan_0000004.json").read_text(encoding="utf-8"))
    assert plan.schedule == "elastic"
    assert plan.slices, "the longest documents are cut"


def test_metrics_tell_of_planning(two_stages):
    finished, folder = two_stages
    rows = metrics_of(folder / "metrics.jsonl")
    for row in rows:
        assert row["planning_s"] > 0
        assert row["planning_waited_s"] >= 0
        assert isinstance(row["planning_fallback"], bool)
        assert row["num_chunks"] >= row["num_pipelines"] >= 1
        assert row["predicted_ms"] > 0
        assert 0 < row["pipeline_ms"] <= row["elapsed_ms"]
    assert max(row["num_slices"] for row in rows) > 1
    lines = finished.output.splitlines()
    told = [line for line in lines if "iteration " in line and "planning (s): " in line]
    assert len(told) == len(rows)
    assert f"| slices: {rows[0]['num_slices']} | predicted (ms): {rows[0]['predicted_ms']:.1f} |" in told[0]
    assert [line for line in lines if line.startswith("planning took ")]


def test_evaluation_is_megatrons_loss_of_whole_documents(two_stages, corpus):
    """At the last iteration, by the weights in the checkpoint; the evaluation before it took 16 documents."""
    finished, folder = two_stages
    _, found = validation_losses(finished)
    count = inspect_prefix(str(corpus)).num_documents
    first, last = (round(bound / 11 * count) for bound in (8, 10))
    words = [
        *MODEL, "--data-path", corpus, "--pipeline-schedule", "1f1b", "--max-position-embeddings", LONGEST,
        "--load", folder / "saved", "--allow-changed", "calculate-per-token-loss", "global-batch-size",
        "max-seq-length", "split", "pipeline-schedule",
    ]  # fmt: skip
    position = 2 * BATCH
    (expected,) = run_on_ranks(
        1, megatrons_mean_loss, [str(word) for word in words], corpus, range(first, last), position,
        2 * BATCH, LONGEST,
    )  # fmt: skip
    assert found == pytest.approx(expected, rel=2e-6)


def test_a_checkpoint_of_other_data_is_refused(two_stages, corpus, arguments):
    """Only in the same data can a position be gone on from; one rank, because all find the same."""
    common = [
        *MODEL, "--data-path", corpus, *arguments, *SPLIT, "--load", two_stages[1] / "saved",
        "--train-iters", 5,
    ]  # fmt: skip
    changes = [[], ["--max-seq-length", 256], ["--seed", 7], ["--split", "9,1,1"], ["--global-batch-size", 4]]
    jobs = [[str(word) for word in (*common, *change)] for change in changes]
    ((same, longest, seed, split, batch),) = run_on_ranks(1, refusals, jobs)
    assert same == ""
    assert f"was trained with --max-seq-length {LONGEST}, this job has 256; give the same, or" in longest
    assert "was trained with --seed 1234, this job has 7; give the same, or" in seed
    assert "was trained with --split 8,2,1, this job has 9,1,1; give the same, or" in split
    assert f"was trained with --global-batch-size {BATCH}, this job has 4; give the same, or" in batch
    assert all("\n" not in refusal for refusal in (longest, seed, split, batch))


def helix_arguments(arguments):
    """The same job by rounds of helix; the costs know one level, and need room for it."""
    words = [word if word != "elastic" else "elastic-helix" for word in arguments]
    words[words.index("--memory-limit-gib") + 1] = 0.05
    return [*words, "--recompute-levels", "none", "--pipeline-model-parallel-size", 2]


@pytest.mark.slow
def test_elastic_helix_gives_the_same_losses(two_stages, launch, arguments, tmp_path):
    """With plans of its own, evaluations and a checkpoint, from which elastic 1F1B goes on."""
    finished = launch(
        2, *helix_arguments(arguments), *SPLIT, *EVALUATED, "--metrics-jsonl", tmp_path / "metrics.jsonl",
        "--trace-dir", tmp_path / "trace", "--save", tmp_path / "saved",
    )  # fmt: skip
    assert finished.code == 0, finished.errors
    rows = metrics_of(tmp_path / "metrics.jsonl")
    assert [row["schedule"] for row in rows] == ["elastic-helix"] * 4
    assert losses_of(tmp_path) == pytest.approx(losses_of(two_stages[1]), rel=1e-5)
    assert validation_losses(finished) == pytest.approx(validation_losses(two_stages[0]), rel=1e-5)
    plan = Plan.from_json((tmp_path / "trace" / "plan_0000004.json").read_text(encoding="utf-8"))
    assert plan.schedule == "elastic-helix"
    assert all(row["predicted_ms"] > 0 and row["num_pipelines"] >= 1 for row in rows)
    further = launch(
        2, *arguments, *SPLIT, "--load", tmp_path / "saved", "--allow-changed", "pipeline-schedule",
        "--pipeline-model-parallel-size", 2, "--train-iters", 5,
    )  # fmt: skip
    assert further.code == 0, further.errors
    assert "going on from iteration 4" in further.output


@pytest.mark.slow
def test_uneven_stages_and_a_chosen_family_give_the_same_losses(two_stages, launch, arguments, tmp_path):
    roomy = list(arguments)
    roomy[roomy.index("--memory-limit-gib") + 1] = 0.05
    chosen = [word if word != "elastic" else "elastic-auto" for word in roomy]
    for name, words, told in (
        ("uneven", [*roomy, "--decoder-last-pipeline-num-layers", 1], "elastic: 2 ranks"),
        ("chosen", chosen, "elastic-auto chose elastic"),
    ):
        finished = launch(
            2, *words, *SPLIT, *EVALUATED, "--pipeline-model-parallel-size", 2, "--metrics-jsonl",
            tmp_path / name / "metrics.jsonl",
        )  # fmt: skip
        assert finished.code == 0, finished.errors
        assert told in finished.output
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(two_stages[1]), rel=1e-5)
        assert validation_losses(finished) == pytest.approx(validation_losses(two_stages[0]), rel=1e-5)


@pytest.mark.slow
def test_one_rank_gives_the_same_losses(two_stages, launch_alone, arguments, tmp_path):
    finished = launch_alone(*arguments, *SPLIT, *EVALUATED, "--metrics-jsonl", tmp_path / "metrics.jsonl")
    assert finished.code == 0, finished.errors
    assert losses_of(tmp_path) == pytest.approx(losses_of(two_stages[1]), rel=1e-5)
    assert validation_losses(finished) == pytest.approx(validation_losses(two_stages[0]), rel=1e-5)


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
    common = [*arguments, *SPLIT, *EVALUATED, *layout]
    finished = launch(ranks, *common, "--metrics-jsonl", tmp_path / "metrics.jsonl")
    assert finished.code == 0, finished.errors
    assert losses_of(tmp_path) == pytest.approx(losses_of(two_stages[1]), rel=1e-5)
    assert validation_losses(finished) == pytest.approx(validation_losses(two_stages[0]), rel=1e-5)


@pytest.mark.slow
def test_a_stopped_job_goes_on_with_the_next_documents(two_stages, launch, arguments, tmp_path):
    common = [
        *arguments,
        *SPLIT,
        "--pipeline-model-parallel-size",
        2,
        "--metrics-jsonl",
        tmp_path / "metrics.jsonl",
    ]
    first = launch(2, *common, "--train-iters", 2, "--save", tmp_path / "saved")
    assert first.code == 0, first.errors
    second = launch(2, *common, "--load", tmp_path / "saved")
    assert second.code == 0, second.errors
    assert losses_of(tmp_path) == pytest.approx(losses_of(two_stages[1]), rel=1e-5)
