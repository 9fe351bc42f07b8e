"""Stopping and going on: under the same layout, under another one, and from checkpoints that are no good."""

from __future__ import annotations

import shutil

import pytest
from job_settings import job_settings
from jobs import MODEL, metrics_of
from ranks import run_on_ranks
from training_worker import Fault, run_cases

from megatron.pretrain.checkpoint.checkpoint import load_checkpoint
from megatron.pretrain.checkpoint.files import TRACKER
from megatron.pretrain.settings.arguments import parse_arguments

BASELINE = ("--pipeline-schedule", "1f1b", "--pipeline-model-parallel-size", 2)
# What must not depend on where a job was interrupted; times and memory do.
LEARNED = ("iteration", "lm_loss", "grad_norm", "learning_rate")


def learned(rows, *keys):
    return [tuple(row[key] for key in keys or LEARNED) for row in rows]


def assert_goes_on_alike(metrics, expected):
    rows = metrics_of(metrics)
    assert [row["iteration"] for row in rows] == [3, 4]
    for found, wanted in zip(learned(rows), learned(expected[2:]), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def half(launch, tmp_path_factory):
    """Two of four iterations, saved; the command already names the folder to load from, still missing."""
    folder = tmp_path_factory.mktemp("half")
    saved, metrics = folder / "saved", folder / "metrics.jsonl"
    finished = launch(
        2, *BASELINE, "--train-iters", 2, "--load", saved, "--save", saved, "--metrics-jsonl", metrics
    )
    assert finished.code == 0, finished.errors
    assert finished.errors == ""
    assert "going on" not in finished.output
    return folder


@pytest.fixture(scope="module")
def alone_half(corpus, tmp_path_factory):
    """The folder in which a single rank has saved two iterations."""
    saved = tmp_path_factory.mktemp("alone") / "saved"
    options = f"--data-path {corpus} --train-iters 2 --save {saved}"
    ((outcome,),) = run_on_ranks(1, run_cases, [(options, Fault())], 1, 1, " ".join(MODEL))
    assert outcome["code"] == 0, outcome
    return saved


@pytest.fixture(scope="module")
def distributed_half(launch, tmp_path_factory):
    """The same with the distributed optimizer."""
    saved = tmp_path_factory.mktemp("distributed") / "saved"
    finished = launch(2, *BASELINE, "--use-distributed-optimizer", "--train-iters", 2, "--save", saved)
    assert finished.code == 0, finished.errors
    assert finished.errors == ""
    return saved


@pytest.mark.slow
def test_same_layout_goes_on_bitwise(launch, trained, half, tmp_path):
    copy = tmp_path / "half"
    shutil.copytree(half, copy)
    saved, metrics = copy / "saved", copy / "metrics.jsonl"
    with metrics.open("a") as stream:
        # A run killed after its checkpoint leaves lines of iterations that are now repeated, one of them cut.
        stream.write('{"iteration": 3, "lm_loss": 1.0}\n{"iteration": 4, "lm_lo')
    finished = launch(2, *BASELINE, "--load", saved, "--save", saved, "--metrics-jsonl", metrics)
    assert finished.code == 0, finished.errors
    assert f"going on from iteration 2 of {saved}" in finished.output.splitlines()
    assert learned(metrics_of(metrics)) == learned(trained("1f1b").rows)
    assert "consumed samples: 12 " in finished.output
    assert (saved / TRACKER).read_text() == "4\n"
    assert sorted(path.name for path in saved.glob("iter_*")) == ["iter_0000002", "iter_0000004"]


@pytest.mark.slow
def test_goes_on_under_helix_on_one_rank(launch_alone, trained, half, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    finished = launch_alone(
        "--pipeline-schedule", "helix", "--load", half / "saved", "--metrics-jsonl", metrics
    )
    assert finished.code == 0, finished.errors
    assert_goes_on_alike(metrics, trained("1f1b").rows)


@pytest.mark.slow
def test_distributed_optimizer_goes_on_with_another_layout(launch, trained, distributed_half, tmp_path):
    """From two pipeline ranks to two data-parallel ones."""
    metrics = tmp_path / "metrics.jsonl"
    finished = launch(
        2, "--pipeline-schedule", "helix", "--use-distributed-optimizer", "--load", distributed_half,
        "--metrics-jsonl", metrics,
    )  # fmt: skip
    assert finished.code == 0, finished.errors
    assert_goes_on_alike(metrics, trained("1f1b").rows)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["plain", "distributed"])
def test_goes_on_under_helix_on_four_ranks(launch, trained, half, distributed_half, tmp_path, optimizer):
    metrics = tmp_path / "metrics.jsonl"
    options = ["--load", half / "saved"]
    if optimizer == "distributed":
        options = ["--load", distributed_half, "--use-distributed-optimizer"]
        # Weights on loan change who owns what, not what a checkpoint holds.
        options += ["--attention-range", "block", "--head-placement", "spread"]
    finished = launch(
        4, "--pipeline-schedule", "helix", "--pipeline-model-parallel-size", 4, "--num-fold", 1, *options,
        "--metrics-jsonl", metrics,
    )  # fmt: skip
    assert finished.code == 0, finished.errors
    assert_goes_on_alike(metrics, trained("1f1b").rows)


@pytest.mark.slow
def test_distributed_optimizer_goes_on_bitwise(launch, tmp_path):
    """Two tensor-parallel by two data-parallel ranks: fp32 weights and moments lie in four parts."""
    common = (
        4, "--pipeline-schedule", "helix", "--tensor-model-parallel-size", 2, "--use-distributed-optimizer",
        "--sequence-parallel", "--bf16",
    )  # fmt: skip
    whole, parts, saved = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "saved"
    for options in (
        ["--metrics-jsonl", whole],
        ["--metrics-jsonl", parts, "--save", saved, "--train-iters", 2],
        ["--metrics-jsonl", parts, "--load", saved],
    ):
        finished = launch(*common, *options)
        assert finished.code == 0, finished.errors
    assert learned(metrics_of(parts)) == learned(metrics_of(whole))


@pytest.mark.slow
def test_helix_hands_over_to_other_schedules(launch, launch_alone, trained, tmp_path):
    saved = tmp_path / "saved"
    finished = launch(
        2, "--pipeline-schedule", "helix", "--pipeline-model-parallel-size", 2, "--train-iters", 2,
        "--save", saved,
    )  # fmt: skip
    assert finished.code == 0, finished.errors
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert launch_alone("--load", saved, "--metrics-jsonl", one).code == 0
    finished = launch(
        2, "--pipeline-schedule", "interleaved", "--pipeline-model-parallel-size", 2,
        "--num-layers-per-virtual-pipeline-stage", 1, "--load", saved, "--metrics-jsonl", two,
    )  # fmt: skip
    assert finished.code == 0, finished.errors
    for metrics in (one, two):
        assert_goes_on_alike(metrics, trained("1f1b").rows)


@pytest.mark.slow
def test_stages_on_a_v_train_alike_and_hand_over(launch, tmp_path):
    """Two iterations under zb-v, two under 1F1B, against four under 1F1B."""
    common = (
        2, "--pipeline-model-parallel-size", 2, "--untie-embeddings-and-output-weights",
        "--recompute-granularity", "selective", "--eval-iters", 1,
    )  # fmt: skip
    whole, parts, saved = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "saved"
    for options in (
        ["--pipeline-schedule", "1f1b", "--metrics-jsonl", whole],
        ["--pipeline-schedule", "zb-v", "--metrics-jsonl", parts, "--train-iters", 2, "--save", saved],
        ["--pipeline-schedule", "1f1b", "--metrics-jsonl", parts, "--load", saved],
    ):
        finished = launch(*common, *options)
        assert finished.code == 0, finished.errors
        assert finished.errors == ""
    for found, wanted in zip(learned(metrics_of(parts)), learned(metrics_of(whole)), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(launch_alone, half, tmp_path):
    saved = tmp_path / "saved"
    shutil.copytree(half / "saved", saved)
    finished = launch_alone("--load", saved, "--save", saved, "--keep-checkpoints", 2)
    assert finished.code == 0, finished.errors
    (victim, *_) = sorted((saved / "iter_0000004").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    finished = launch_alone("--load", saved)
    assert finished.code == 3
    (line,) = finished.errors.splitlines()
    assert line.startswith(
        f"pretrain_gpt: rank 0: error: {victim} has another checksum than when it was saved"
    )
    assert line.endswith("add --load-fallback to go on from the one before it")
    assert "iteration 3/" not in finished.output
    finished = launch_alone("--load", saved, "--load-fallback")
    assert finished.code == 0, finished.errors
    assert f"{victim} has another checksum" in finished.output
    assert f"going on from iteration 2 of {saved}" in finished.output.splitlines()


@pytest.mark.slow
def test_a_damaged_checkpoint_ends_the_job_with_one_line(launch_alone, alone_half, tmp_path):
    saved = tmp_path / "saved"
    shutil.copytree(alone_half, saved)
    (victim, *_) = sorted(saved.glob("iter_0000002/*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-1])
    finished = launch_alone("--load", saved)
    assert finished.code == 3
    (line,) = finished.errors.splitlines()
    assert line.startswith(f"pretrain_gpt: rank 0: error: {victim} has ")
    assert "it is truncated or from another save" in line
    assert "iteration 1/" not in finished.output


TRACKERS = {
    "empty": (b"", "holds '' instead"),
    "word": (b"abc", "holds 'abc' instead"),
    "negative": (b"-1", "holds '-1' instead"),
    "missing step": (b"999999", "names iter_0999999, which is not there"),
    "NUL": (b"2\0\0\0", r"holds '2\x00\x00\x00' instead"),
    "not text": (b"\xff", "holds '\ufffd' instead"),
    "two lines": (b"2\n4\n", r"holds '2\n4' instead"),
}


@pytest.mark.parametrize("case", TRACKERS)
def test_bad_tracker_lists_usable_steps(alone_half, tmp_path, case):
    content, expected = TRACKERS[case]
    shutil.copytree(alone_half, tmp_path / "saved")
    # Not whole: must not be offered.
    (tmp_path / "saved" / "iter_0000003").mkdir()
    tracker = tmp_path / "saved" / TRACKER
    tracker.write_bytes(content)
    with pytest.raises(ValueError, match=r".") as error:
        load_checkpoint(job_settings(), tmp_path / "saved", state=None)
    message = str(error.value)
    assert message.startswith(f"{tracker} {expected}")
    assert message.endswith("usable: iter_0000002")
    assert message.isprintable()


def test_tracker_without_checkpoints(tmp_path):
    (tmp_path / TRACKER).write_text("2")
    with pytest.raises(ValueError, match="usable: none"):
        load_checkpoint(job_settings(), tmp_path, state=None)


def test_checkpoints_without_tracker(alone_half, tmp_path):
    shutil.copytree(alone_half, tmp_path / "saved")
    (tmp_path / "saved" / TRACKER).unlink()
    with pytest.raises(ValueError, match=f"no {TRACKER}; write the wanted iteration there"):
        load_checkpoint(job_settings(), tmp_path / "saved", state=None)


@pytest.mark.slow
def test_bad_tracker_stops_the_job(launch_alone, alone_half, tmp_path):
    shutil.copytree(alone_half, tmp_path / "saved")
    (tmp_path / "saved" / TRACKER).write_text("abc")
    finished = launch_alone("--load", tmp_path / "saved")
    assert finished.code == 3
    (line,) = finished.errors.splitlines()
    assert line.startswith("pretrain_gpt: rank 0: error: ")
    assert line.endswith("usable: iter_0000002")
    assert "iteration 1/" not in finished.output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--num-layers", "8"], "--num-layers 4, this job has 8"),
        (["--hidden-size", "32"], "--hidden-size 64, this job has 32"),
        (["--ffn-hidden-size", "128"], "--ffn-hidden-size 256, this job has 128"),
        (["--num-attention-heads", "2"], "--num-attention-heads 4, this job has 2"),
        (["--normalization", "RMSNorm"], "--normalization LayerNorm, this job has RMSNorm"),
        (["--swiglu"], "--swiglu False, this job has True"),
        (["--max-position-embeddings", "256"], "--max-position-embeddings 128, this job has 256"),
        (["--seq-length", "64"], "--seq-length 128, this job has 64"),
        (["--seed", "7"], "--seed 1234, this job has 7"),
        (["--global-batch-size", "8"], "--global-batch-size 4, this job has 8"),
        (["--norm-epsilon", "1e-1"], "--norm-epsilon 1e-05, this job has 0.1"),
        (["--hidden-dropout", "0.1"], "--hidden-dropout 0.0, this job has 0.1"),
        (["--lr", "1"], "--lr 0.003, this job has 1.0"),
        (["--bf16"], "--bf16 False, this job has True"),
        (["--use-distributed-optimizer"], "--use-distributed-optimizer False, this job has True"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_other_settings_are_refused(alone_half, corpus, monkeypatch, options, expected):
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = parse_arguments([*MODEL, "--data-path", str(corpus), *options])
    with pytest.raises(ValueError, match=r".") as error:
        load_checkpoint(settings, alone_half, state=None)
    said = str(error.value)
    assert said.startswith(f"{alone_half / 'iter_0000002'} was trained with ")
    assert expected in said
    assert "; give the same, or " in said
