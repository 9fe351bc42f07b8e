"""The executor's own cost: the benchmark runs, and memory does not grow with iterations."""

import gc
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from toy_segments import ToySegments

from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.runtime.communicator import InMemoryFabric
from helixpipe.runtime.executor import Executor
from helixpipe.runtime.trace import HostClock, Trace

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_times_every_kind_of_operation():
    done = subprocess.run(
        [sys.executable, "benchmarks/executor.py", "--iterations", "2", "--memory-iterations", "20"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    first = [row.split()[0] for row in rows[1:]]
    assert first == [
        *("1F1B,", "rank", "torch", "helixpipe", "layer", "ours"),
        *("operations", "1f1b", "zb-h1", "helix", "memory:"),
    ]
    for row in rows[8:11]:
        assert all(f" {kind} " in row for kind in ("F", "B", "RECV_B"))
    # Both computed the same gradients, or the script had failed; a ratio per rank.
    assert len(rows[6].split()) == 3 + 2


def test_nothing_is_left_behind_by_an_iteration():
    """Traces, buffers and results of 300 iterations take no more room than those of ten."""
    plan = build_plan("helix", ScheduleRequest(num_layers=2, num_ranks=1, num_microbatches=2))
    fabric = InMemoryFabric(1)
    executor = Executor(
        plan,
        ToySegments(plan.num_segments),
        fabric.communicator(0),
        device=torch.device("cpu"),
        trace=Trace(HostClock()),
    )

    def held_after(iterations):
        for _ in range(iterations):
            executor.run()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first = held_after(10)
        assert held_after(300) < first + 2000
    finally:
        tracemalloc.stop()
