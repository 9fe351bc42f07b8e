"""The norm of the weights is the one that Megatron-LM's own program logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
