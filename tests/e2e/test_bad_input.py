"""Bad input ends with one clear line on each rank and a non-zero exit, never a hang or our traceback."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from jobs import MODEL, ROOT

from helixpipe.__main__ import main as planner
from megatron.pretrain import loop

HELIX = ("--pipeline-schedule", "helix", "--pipeline-model-parallel-size", 2)


def assert_one_line_per_rank(finished, ranks, *words):
    assert finished.code != 0
    lines = [line for line in finished.errors.splitlines() if line.startswith("pretrain_gpt: ")]
    assert sorted(line[:27] for line in lines) == [
        f"pretrain_gpt: rank {rank}: error" for rank in range(ranks)
    ]
    for line in lines:
        assert all(word in line for word in words), line
    assert_no_traceback_of_ours(finished)
    # torchrun's report lists what became of each rank.
    codes = re.findall(r"exitcode +: (-?\d+)", finished.errors)
    assert len(codes) == ranks
    assert "0" not in codes


def assert_no_traceback_of_ours(finished):
    assert 'program.py", line' not in finished.errors
    assert "megatron/" not in finished.errors


# Found on real ranks


@pytest.mark.slow
def test_world_that_does_not_split(launch):
    finished = launch(2, *HELIX, "--tensor-model-parallel-size", 2, timeout_s=60)
    assert_one_line_per_rank(finished, 2, "world size 2", "tensor-parallel size 2", "multiple of 4")


def test_corrupt_index_on_two_ranks_of_which_one_starts_late(launch, damaged_corpus, tmp_path):
    """torchrun must not stop the late rank before it has said its line."""
    index = Path(f"{damaged_corpus}.idx")
    index.write_bytes(b"PK\x03\x04" + index.read_bytes()[4:])
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '1': time.sleep(3)\n"
    )
    search_path = f"{tmp_path}{os.pathsep}{ROOT}"
    finished = launch(2, *HELIX, "--data-path", damaged_corpus, timeout_s=60, PYTHONPATH=search_path)
    assert_one_line_per_rank(finished, 2, str(index), "wrong magic", "prepare")


@pytest.mark.slow
def test_loss_that_is_not_finite(launch, tmp_path):
    finished = launch(2, *HELIX, "--lr", "1e30", "--save", tmp_path / "saved", timeout_s=60)
    assert_one_line_per_rank(finished, 2, "iteration 2", "the loss of micro batch 0 is nan", "--lr")
    assert "exitcode  : 6 " in finished.errors
    assert not list((tmp_path / "saved").iterdir())


@pytest.mark.slow
def test_failure_of_one_rank_alone_ends_the_others(launch, tmp_path):
    """Rank 0 writes the metrics; the other must neither wait for it nor bury its message."""
    finished = launch(2, *HELIX, "--metrics-jsonl", tmp_path, timeout_s=60)
    assert finished.code != 0
    lines = [line for line in finished.errors.splitlines() if line.startswith("pretrain_gpt: ")]
    own, other = sorted(lines)
    assert own == f"pretrain_gpt: rank 0: error: [Errno 21] Is a directory: '{tmp_path}'"
    assert other.startswith("pretrain_gpt: rank 1: error: rank 0 (stage 0, host ")
    assert f"failed: [Errno 21] Is a directory: '{tmp_path}'" in other
    assert_no_traceback_of_ours(finished)


# Found before there is a process group, so in this process


@pytest.fixture(scope="module")
def pretrain_gpt():
    spec = importlib.util.spec_from_file_location("pretrain_gpt", ROOT / "pretrain_gpt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def refusal(pretrain_gpt, corpus, monkeypatch, capsys):
    """``refusal(*arguments)``: the single line with which the job refuses them."""

    def refuse(*arguments, world_size=1, rank=0, code=2):
        command = ["pretrain_gpt.py", *MODEL, "--data-path", corpus, *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(loop, "initialize", lambda *_: pytest.fail("went on with bad input"))
        assert pretrain_gpt.main() == code
        output, errors = capsys.readouterr()
        assert output == ""
        (line,) = errors.splitlines()
        start = f"pretrain_gpt: rank {rank}: error: "
        assert line.startswith(start)
        return line.removeprefix(start)

    return refuse


@pytest.mark.parametrize(
    ("world_size", "arguments", "words"),
    [
        (1, "--num-layers nine", ["--num-layers", "'nine'"]),
        (1, "--no-such-flag", ["--no-such-flag"]),
        # An abbreviation may come to mean something else.
        (1, "--num-layer 4", ["--num-layer 4"]),
        (1, "--pipeline-schedule heliks", ["'heliks'", "did you mean helix?"]),
        (1, "--pipeline-schedule 1F1B", ["'1F1B'", "known: ", "1f1b"]),
        (1, "--pipeline-schedule seq1f1b --num-slices 129", ["--num-slices 129", "128 tokens", "use fewer"]),
        (1, "--pipeline-schedule helix --attention-range mlp", ["'mlp'", "core, qkv, block"]),
        (2, "--pipeline-schedule helix --num-layers 1", ["layers (1)", "at most that many ranks"]),
        (2, "--pipeline-schedule 1f1b --num-layers 5", ["layers (5)", "use 4 or 6"]),
        (2, "--pipeline-schedule helix --global-batch-size 1", ["micro batches (1)", "use 2"]),
        (3, "", ["world size 3", "pipeline-parallel size 2", "--nproc-per-node 2"]),
        (
            2,
            "--pipeline-schedule helix --recompute-granularity full",
            ["--recompute-granularity", "use 1f1b"],
        ),
        (1, "--seq-length 129 --max-position-embeddings 128", ["--seq-length 129", "128"]),
        (1, "--memory-limit-gib -1", ["--memory-limit-gib", "above 0", "-1"]),
        (
            1,
            "--attention-dropout 0.1 --pipeline-schedule seq1f1b",
            ["--attention-dropout does not go with seq1f1b", "use --attention-dropout 0"],
        ),
        (1, "--split 1,99,0", ["--split 1,99,0 leaves none of", "for training; give it at least", "%"]),
        (1, "--eval-iters 1 --split 1,0,0", ["--split 1,0,0 leaves none of", "for validation"]),
        (4, "--num-layers 30", ["layers (30)", "pipeline-parallel size (4)", "use 28 or 32"]),
        (1, "--num-layers 9999999", ["--num-layers", "at most 16384, not 9999999"]),
        (1, "--save /proc/nowhere", ["--save", "/proc/nowhere", "give another path"]),
        (1, "--trace-dir /proc/nowhere", ["--trace-dir", "/proc/nowhere", "give another path"]),
        (1, "--metrics-jsonl /proc/nowhere/m", ["--metrics-jsonl", "/proc/nowhere", "another path"]),
    ],
)
def test_bad_arguments(refusal, world_size, arguments, words):
    size = ["--pipeline-model-parallel-size", 4 if world_size == 4 else min(world_size, 2)]
    for rank in range(world_size):
        line = refusal(*size, *arguments.split(), world_size=world_size, rank=rank)
        for word in words:
            assert word in line


def test_no_data(refusal):
    line = refusal("--data-path", "/nowhere/at/all", code=3)
    assert line.startswith("/nowhere/at/all.bin: no such file")
    assert "check the prefix" in line


@pytest.mark.parametrize(
    "arguments",
    [
        "--num-layers 30",
        "--num-layers 0",
        "--num-layers nine",
        "--num-layers 9999999",
        "--num-layrs 4",
        "--pipeline-schedule heliks",
        "--pipeline-schedule helix --num-layers 3",
        "--pipeline-schedule helix --attention-range mlp",
    ],
)
def test_the_planner_says_the_same(refusal, capsys, tmp_path, arguments):
    """In the same words, of the same sizes: 4 ranks, 4 micro batches."""
    said = refusal("--pipeline-model-parallel-size", 4, *arguments.split(), world_size=4)
    sizes = "--schedule 1f1b --num-layers 4 --pipeline-model-parallel-size 4 --num-microbatches 4"
    changes = arguments.replace("--pipeline-schedule", "--schedule")
    assert planner(["plan", *sizes.split(), *changes.split(), "--output", str(tmp_path / "plan.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.partition(": error: ")[2] == said


def test_data_file_instead_of_prefix(refusal, corpus):
    assert refusal("--data-path", f"{corpus}.bin", code=3).endswith(f"without the suffix, {corpus}")


@pytest.mark.parametrize("suffix", [".idx", ".bin", ".tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_dataset(refusal, damaged_corpus, suffix, damage):
    path = Path(f"{damaged_corpus}{suffix}")
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-7])
    line = refusal("--data-path", damaged_corpus, code=3)
    assert line.startswith(f"{path}: ")


def test_token_outside_the_vocabulary(refusal, damaged_corpus):
    path = Path(f"{damaged_corpus}.bin")
    tokens = np.fromfile(path, dtype=np.uint16)
    tokens[1000] = 300
    tokens.tofile(path)
    line = refusal("--data-path", damaged_corpus, code=3)
    assert line.startswith(f"{path}: token 1000 has id 300, outside the vocabulary of 300")


def test_help_is_not_an_error(pretrain_gpt, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        pretrain_gpt.main()
    assert stop.value.code == 0
    assert "--pipeline-schedule" in capsys.readouterr().out
