"""``helixpipe train``: what is started, and what a dry run says without starting it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helixpipe.__main__ import main
from helixpipe.commands import training
from helixpipe.reliability import exit_codes

ROOT = Path(__file__).parents[2]
JOB = (
    "--pipeline-schedule helix --pipeline-model-parallel-size 4 --num-layers 8 --hidden-size 256 "
    "--num-attention-heads 8 --seq-length 1024 --micro-batch-size 1 --global-batch-size 8 --train-iters 40 "
    "--lr 1e-3 --seed 7 --data-path nowhere"
).split()
ON_64 = "64 GPUs = tensor 8 x pipeline 8 x data 1, sequence parallel, distributed optimizer"
EXAMPLES = [
    pytest.param(
        "pretrain_gpt_single_node", ["corpus"], "h100", "8 GPUs = tensor 1 x pipeline 8 x data 1", "",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "pretrain_in_megatron_lm", ["corpus", "tokenizer.model"], "h100",
        "8 GPUs = tensor 1 x pipeline 8 x data 1", "", marks=pytest.mark.slow,
    ),
    ("pretrain_llama_7b_slurm", ["corpus", "saved"], "h20", ON_64, ""),
    pytest.param(
        # Of the sixteen sequences of a batch, which follow one another, one.
        "pretrain_llama_70b_slurm", ["corpus", "saved"], "h20", ON_64, "--global-batch-size 1",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "pretrain_one_million_slurm", ["corpus", "saved"], "h100", ON_64, "", marks=pytest.mark.slow
    ),
]  # fmt: skip
WITHOUT_DATA = ["--vocab-size", "32000"]


@pytest.fixture
def started(monkeypatch):
    """``started(*words)``: the command that takes the place of ``helixpipe train words``."""
    commands = []
    monkeypatch.setattr(os, "execv", lambda path, words: commands.append((path, words)))

    def start(*words):
        assert main(["train", *words]) == 0
        ((path, command),) = commands
        assert path == command[0] == sys.executable
        return command[1:]

    return start


@pytest.fixture
def dry_run(monkeypatch, capsys):
    """``dry_run(*words)``: its lines by their names."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "1")  # put back afterwards
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started"))

    def run(*words):
        code = main(["train", *words])
        output, errors = capsys.readouterr()
        assert (code, errors) == (0, "")
        return dict(line.split(": ", 1) for line in output.splitlines())

    return run


def test_the_size_of_a_tokenizer_goes_to_the_program(started):
    words = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "99"]
    assert started("--nproc-per-node", "1", *JOB, *words)[-4:] == words


def test_everything_that_is_not_torchruns_goes_to_the_program_in_its_order(started):
    assert started(*JOB[:4], "--nproc-per-node", "4", *JOB[4:]) == [
        "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone",
        "-m", "megatron.pretrain", *JOB,
    ]  # fmt: skip


def test_several_nodes(started):
    place = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "node-0", "--master-port", "29500"]
    assert started("--nproc-per-node", "8", *place, *JOB)[2:] == [
        "--nproc-per-node", "8", *place, "-m", "megatron.pretrain", *JOB,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nnodes", "2", "--node-rank", "0"], "--nnodes 2 needs --master-addr on every node"),
        (["--node-rank", "0"], "--node-rank needs --nnodes above 1; leave it out"),
        (["--vocab-size", "9"], "--vocab-size is for --dry-run; the data says it"),
    ],
)
def test_what_does_not_fit_together_is_refused(monkeypatch, capsys, words, message):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started"))
    assert main(["train", "--nproc-per-node", "2", *words]) == 2
    assert capsys.readouterr().err == f"helixpipe train: error: {message}\n"


def test_other_commands_still_refuse_what_they_do_not_know(capsys):
    assert main(["simulate", "--plan", "x", "--costs", "y", "--nproc", "2"]) == 2
    assert "unrecognized arguments: --nproc 2" in capsys.readouterr().err


def test_a_dry_run_says_what_the_planner_says(dry_run, tmp_path, capsys):
    """The same plan, costs and clock through the planner's commands."""
    place = ["--nproc-per-node", "8", "--dry-run", "h20", "--vocab-size", "1000"]
    said = dry_run(
        *place, *JOB, "--recompute-levels", "none", "--untie-embeddings-and-output-weights", "--bf16"
    )
    assert said["layout"] == "8 GPUs = tensor 1 x pipeline 4 x data 2"
    assert said["batch"].startswith("8 sequences of 1024 tokens = 4 micro batches of 1 x 2 replicas; 40 ")
    assert said["plan"].startswith("helix (num_fold 2, attention_range core), 17 segments on 4 ranks, ")
    assert said["recompute"] == "none"
    plan, costs, result = (str(tmp_path / f"{name}.json") for name in ("plan", "costs", "result"))
    model = tmp_path / "model.sh"
    model.write_text(" ".join([*JOB, "--untie-embeddings-and-output-weights --vocab-size 1024"]))
    shape = "--num-layers 8 --pipeline-model-parallel-size 4 --num-microbatches 4"
    assert main(f"plan --schedule helix {shape} --output {plan}".split()) == 0
    sizes = f"--model {model} --hardware h20 --seq-length 1024 --data-parallel-size 2"
    assert main(f"costs --plan {plan} {sizes} --output {costs}".split()) == 0
    assert main(f"simulate --plan {plan} --costs {costs} --output {result}".split()) == 0
    iteration_ms = float(re.search(r'"iteration_ms": ([0-9.]+)', Path(result).read_text())[1])
    assert said["predicted on h20"].startswith(f"{iteration_ms:.1f} ms per iteration, bubble ")
    assert f"{8 * 1024 / iteration_ms * 1e3 / 8:.0f} tokens/s per GPU" in said["predicted on h20"]
    assert said["command"].startswith(
        "torchrun --nproc-per-node 8 -m megatron.pretrain --pipeline-schedule helix"
    )


def test_a_dry_run_goes_by_the_attention_that_was_chosen(dry_run):
    def predicted_speed(*words):
        job = ["--nproc-per-node", "4", "--dry-run", "h100", "--vocab-size", "1000", *JOB]
        said = dry_run(*job, "--seq-length", "131072", "--bf16", *words)
        return int(re.search(r"(\d+) tokens/s", said["predicted on h100"])[1])

    fastest = predicted_speed()
    assert fastest == predicted_speed("--attention-backend", "flash-attn-3")
    # A tenth slower; about half as fast; and one of which no rate is known.
    assert fastest > predicted_speed("--attention-backend", "cudnn") > 0.8 * fastest
    assert predicted_speed("--attention-backend", "aten-flash") < 0.7 * fastest
    assert predicted_speed("--attention-backend", "aten-efficient") == fastest


def test_a_dry_run_leaves_no_folders(dry_run, tmp_path):
    outputs = ["--save", tmp_path / "saved", "--metrics-jsonl", tmp_path / "metrics" / "m.jsonl"]
    said = dry_run("--nproc-per-node", "4", "--dry-run", "--vocab-size", "1000", *JOB, *map(str, outputs))
    assert said["prediction"] == "none, as the machine is not known; name it, as in --dry-run h20"
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_when_memory_is_too_small(dry_run):
    job = ["--nproc-per-node", "4", "--dry-run", "h20", "--vocab-size", "1000", *JOB]
    assert "does not fit into 0.0;" in dry_run(*job, "--memory-limit-gib", "0.001")["memory"]


def test_a_dry_run_refuses_as_training_does(monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "1")
    assert main(["train", "--nproc-per-node", "4", "--dry-run", *JOB]) == exit_codes.BAD_DATA
    assert capsys.readouterr().err.startswith("helixpipe train: error: nowhere.bin: no such file")


def test_the_program_starts_as_a_module():
    finished = subprocess.run(
        [sys.executable, "-m", training.PROGRAM, "--help"],
        text=True,
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert finished.stdout.startswith("usage: ")
    assert "--pipeline-schedule" in finished.stdout


def dry_run_of(example, *words, **environment):
    """The lines of an example's dry run, by their names."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    finished = subprocess.run(
        ["bash", f"examples/{example}", *map(str, words)], cwd=ROOT, text=True, timeout=120, check=False,
        env=kept | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | environment, capture_output=True,
    )  # fmt: skip
    assert (finished.returncode, finished.stderr) == (0, "")
    return dict(line.split(": ", 1) for line in finished.stdout.splitlines() if ": " in line)


@pytest.mark.parametrize(("example", "words", "machine", "layout", "smaller"), EXAMPLES)
def test_examples_dry_run(tmp_path, example, words, machine, layout, smaller):
    """Anywhere: no SLURM, no GPU, no data."""
    paths = [tmp_path / word for word in words]
    said = dry_run_of(f"{example}.sh", *paths, "--dry-run", machine, *WITHOUT_DATA, *smaller.split())
    assert said["layout"] == layout
    assert "does not fit" not in said["memory"]
    assert f"-m {training.PROGRAM} --pipeline-schedule " in said["command"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_where_batches_are_planned_one_by_one_the_first_one_is(tmp_path):
    prefix = tmp_path / "corpus"
    tool = [sys.executable, "tools/prepare_data.py", "--input", "docs", "--pattern", "*.md"]
    subprocess.run(
        [*tool, "--vocab-size", "300", "--output-prefix", str(prefix)], cwd=ROOT, timeout=60, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
    )  # fmt: skip
    costs = tmp_path / "costs.json"
    words = (prefix, "h100", "--dry-run", "--global-batch-size", 6)
    said = dry_run_of("pretrain_variable_lengths.sh", *words, COSTS=str(costs))
    assert said["batch"] == "6 documents of at most 131072 tokens; 1000 iterations"
    assert re.match(
        r"elastic, of the first batch: 6 sequences, \d+ tokens, the longest \d+, in ", said["plan"]
    )
    assert re.match(r"\d+\.\d m?s for this batch, bubble \d", said[f"predicted by {costs}"])
    assert said["memory"].endswith(" GiB on the fullest GPU, of 72.0")
    elsewhere = dry_run_of(
        "pretrain_variable_lengths.sh", "elsewhere", "h100", "--dry-run", *WITHOUT_DATA, COSTS=str(costs)
    )
    assert elsewhere["plan"].startswith("elastic, each batch has its own; with the data at hand")
