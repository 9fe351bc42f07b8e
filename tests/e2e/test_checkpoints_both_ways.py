"""A job goes from Megatron-LM's own program to ours and back: what it has learned stays, bit by bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from jobs import run
from megatron_lm_jobs import CORES, SUPPORT, each_version, train

from megatron.pretrain.checkpoint.inspection import facts, faults, find_checkpoint
from megatron.pretrain.checkpoint.safe_pickle import read_table

# The vocabulary of the corpus, padded as theirs is.
SIZE = "--vocab-size 300 --pipeline-model-parallel-size 2"
OURS = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1
    --global-batch-size 8 --pipeline-model-parallel-size 2 --pipeline-schedule helix
""".split()
LEARNING_NOTHING = "--lr 0 --weight-decay 0"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, weights and optimizer states."""
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in read_table(folder).state_dict_metadata.items()
        if hasattr(entry, "properties")
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return state


def train_ours(version: str, corpus: Path, arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "pretrain_gpt.py", *OURS, "--data-path", str(corpus)]
    # The installed release, where none is named.
    paths = f"{CORES / version}:{SUPPORT / 'cores'}"
    finished = run([*command, *arguments.split()], 200, PYTHONPATH=f"{paths}:{Path.cwd()}")
    assert finished.code == 0, finished.errors[-3000:]
    return finished.output


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("version", "ranks"), each_version(2))
def test_from_theirs_to_ours_and_back(tmp_path, corpus, version, ranks):
    theirs, ours, back = (tmp_path / name for name in ("theirs", "ours", "back"))
    train(version, ranks, f"{SIZE} --train-iters 3 --eval-iters 0 --save {theirs}")
    output = train_ours(version, corpus, f"--load {theirs} --save {ours} --train-iters 4 {LEARNING_NOTHING}")
    assert "going on from iteration 3" in output
    assert "consumed samples: 32 " in output
    first, second = (find_checkpoint(folder) for folder in (theirs, ours))
    before, after = tensors_of(first), tensors_of(second)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        # An iteration later: what it does not learn from is what was learned.
        is_state = name.startswith("optimizer.")
        assert torch.equal(tensor, after[name]) != is_state, name
    log = train(version, ranks, f"{SIZE} --train-iters 4 {LEARNING_NOTHING} --load {ours} --save {back}")
    assert log.steps == {}
    last = find_checkpoint(back)
    again = tensors_of(last)
    assert again.keys() == after.keys()
    for name, tensor in again.items():
        assert torch.equal(tensor, after[name]), name
    for folder in (first, second, last):
        assert faults(folder) == []
    assert [dict(facts(folder))["consumed samples"] for folder in (first, second, last)] == [24, 32, 32]
