"""The benchmark in simulated time, made short: it checks on every rank that the plan was what ran.

Times are not looked at: on a busy machine a sleep of a millisecond lasts as long as it lasts.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, script="overlap"):
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.slow
def test_every_schedule_is_executed_as_planned():
    """The tool itself compares traces with orders, and counts how often each tensor was handed on."""
    finished = run(
        "--ranks", 4, "--unit-ms", 0.5, "--message-units", 2, "--message-kib", 1, "--iterations", 1
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    rows = [line.split() for line in finished.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1f1b", "zb-h1", "helix-1", "helix-2"]
    # As simulated: 11 pairs of forward and backward one after the other, and 16 messages between them.
    assert float(rows[0][2]) == 82.0
    for row in rows:
        # No rank can be faster than its own operations.
        assert float(row[3]) > 0.9 * 8 * 12 * 0.5
        assert re.fullmatch(r"\d+\.\d{4}", row[4])


def test_sizes_that_do_not_fit_are_refused():
    finished = run("--ranks", 4, "--num-microbatches", 3, "--schedules", "helix-2")
    assert finished.returncode == 2
    assert finished.stderr.startswith("benchmark_overlap: error: ")
    assert finished.stderr.count("\n") == 1


@pytest.mark.slow
def test_rounds_are_executed_as_planned():
    """With loans, W and an order fitted to the cost model's times."""
    finished = run(
        *("--ranks", 4, "--num-microbatches", 8, "--scale", 0.005, "--message-kib", 1, "--iterations", 1),
        script="rounds",
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    lines = finished.stdout.splitlines()[2:]
    assert [line.split(",")[0] for line in lines[:3]] == ["filo", "interlocked", "interlocked-w"]
    assert lines[3].endswith("1.000x filo, without-attention")


def test_rounds_that_do_not_fit_are_refused():
    finished = run("--memory-limit-gib", 1, script="rounds")
    assert finished.returncode == 2
    assert finished.stderr.startswith("benchmark_rounds: error: filo does not fit into 1 GiB")
