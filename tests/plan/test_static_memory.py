"""Weights, gradients and optimizer states as Megatron itself holds them, for every way of cutting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.plan.cost_model import HARDWARE, ModelShape, Recompute, Workload, costs_of_plan, predict_pieces
from helixpipe.plan.cost_model.segments import rank_parameters

ROOT = Path(__file__).parents[2]
SIZES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 4), (2, 2, 2), (1, 4, 2)]
CASES = [
    {
        "layout": {"tensor": t, "pipeline": p, "data": d},
        "tied": tied,
        "distributed": distributed,
    }
    for (t, p, d), (tied, distributed) in product(SIZES, [(False, True), (True, False)])
]


@pytest.fixture(scope="module")
def held_by_megatron():
    pytest.importorskip("megatron.core")
    worker = ROOT / "tests" / "support" / "static_memory_worker.py"
    done = subprocess.run(
        [sys.executable, str(worker), json.dumps(CASES)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def planned(case):
    t, p, d = case["layout"].values()
    model = ModelShape(
        name="small", num_layers=4, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16,
        ffn_hidden_size=160, vocab_size=512, gated=True, tied=case["tied"],
    )  # fmt: skip
    workload = Workload(
        model=model,
        seq_length=64,
        tensor_parallel=t,
        data_parallel=d,
        distributed_optimizer=case["distributed"],
    )
    pieces = predict_pieces(workload, HARDWARE["h100"])
    plan = build_plan(
        "1f1b", ScheduleRequest(num_layers=4, num_ranks=p, num_microbatches=4), compute_only=True
    )
    return workload, rank_parameters(pieces, plan), costs_of_plan(pieces, plan, Recompute.NONE).ranks


@pytest.mark.parametrize("number", range(len(CASES)))
def test_every_rank_holds_what_megatrons_does(held_by_megatron, number):
    """Matrix weights exactly; their bytes exactly, but for the states' even cut over replicas.

    What is left out of plans is added here: norms, as many bytes a weight. A buffer of a distributed
    optimizer is padded to a multiple of its shards (at most 128 weights each, for two buckets).
    """
    case = CASES[number]
    workload, counts, ranks = planned(case)
    d = case["layout"]["data"]
    shards = d if case["distributed"] else 1
    for held, count, rank in zip(held_by_megatron[number], counts, ranks, strict=True):
        assert held["matrices"] == count
        total = count + held["others"]
        padding = 2 * 128 * shards if case["distributed"] else 0
        assert held["weight_bytes"] == 2 * total
        assert 4 * total <= held["gradient_bytes"] <= 4 * (total + padding)
        assert held["state_bytes"] == pytest.approx(12 * total / shards, abs=12 * padding / shards)
        summed = held["weight_bytes"] + held["gradient_bytes"] + held["state_bytes"]
        of_norms = workload.static_bytes(held["others"])
        assert rank.static_bytes + of_norms == pytest.approx(summed, abs=16 * padding + 16)
