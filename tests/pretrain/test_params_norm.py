"""The norm of the weights is the one that Megatron-LM's own program logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_on_ranks
from training_worker import Fault, run_cases, small_model

ROOT = Path(__file__).parents[2]
CORE = Path(os.environ.get("HELIXPIPE_CORES", ROOT / "build/cores")) / "0.17.1"
LINE = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --data-path unused --transformer-impl local"
)
PRECISIONS = ("", "--bf16", "--bf16 --use-distributed-optimizer", "--use-distributed-optimizer")


@pytest.mark.slow
def test_norms_are_those_of_megatrons_program():
    if not CORE.is_dir():
        pytest.skip(f"no megatron-core is unpacked in {CORE}")
    paths = (CORE, ROOT / "tests/support/cores", ROOT)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "WORLD_SIZE": "1",
        "RANK": "0",
        "OMP_NUM_THREADS": "1",
    }
    lines = json.dumps([f"{LINE} {precision}" for precision in PRECISIONS])
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/support/params_norm_worker.py"), lines]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in json.loads(done.stdout.splitlines()[-1]):
        assert ours > 1
        # fp32 sums in another order.
        assert ours == pytest.approx(theirs, rel=1e-6)


def logged(outcome):
    assert outcome["error"] == ""
    return [line.split("params norm: ")[1].split()[0] for line in outcome["lines"] if "params norm: " in line]


def test_weights_that_are_gathered_later_count_as_they_are(tmp_path):
    """With the gathering overlapped, the next forward pass waits for what other ranks have stepped."""
    evaluated = "--eval-iters 1 --eval-interval 2 --split 70,30,0"
    sharded = f"--log-params-norm --use-distributed-optimizer --overlap-grad-reduce {evaluated}"
    late = f"{sharded} --overlap-param-gather"
    lines = [sharded, late, f"{late} --pipeline-schedule helix"]
    cases = [(line, Fault()) for line in lines]
    (at_once, *others), _ = run_on_ranks(2, run_cases, cases, 1, 1, small_model(tmp_path))
    assert len(set(logged(at_once))) == 3
    for other in others:
        assert logged(other) == logged(at_once)
