"""The benchmark of watching runs, and the sentinels that it starts end with it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_names_every_cost():
    done = subprocess.run(
        [sys.executable, "benchmarks/monitor.py", "--iteration-ms", "1000", "--seconds", "1"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert names == ["record", "header", "rank's own thread", "hash of the plan, once per job", "sentinels"]
    assert re.search(r"[\d.]+% of an iteration", done.stdout)
    assert done.stderr == ""
