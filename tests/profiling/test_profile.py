"""Profiles on real ranks: every piece measured, the same on all ranks, usable by the planner."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from profile_worker import profile_here
from ranks import run_on_ranks

from helixpipe.plan import Plan, ScheduleRequest, build_plan
from helixpipe.plan.cost_model import ModelShape, Pieces, Recompute, Workload, costs_of_plan
from helixpipe.plan.cost_model.work import PIECES
from helixpipe.plan.simulation.costs import parse_costs
from helixpipe.plan.simulation.simulate import simulate

ROOT = Path(__file__).parents[2]
TINY = ModelShape(
    name="tiny", num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8,
    ffn_hidden_size=64, vocab_size=100, gated=True, tied=False,
)  # fmt: skip


def workload(**changes):
    return Workload(**{"model": TINY, "seq_length": 64, "element_bytes": 4, **changes})


@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [
        (1, workload()),
        (2, workload(micro_batch_size=2)),
        (2, workload(tensor_parallel=2)),
        (2, workload(model=replace(TINY, gated=False, tied=True, num_kv_heads=4))),
    ],
    ids=["alone", "pipeline", "tensor", "gpt"],
)
def test_every_piece_is_measured(ranks, wanted):
    found = run_on_ranks(ranks, profile_here, wanted)
    assert all(pieces == found[0] for pieces in found), "every rank plans with the same numbers"
    pieces = found[0]
    assert pieces.workload == wanted
    assert set(pieces.times) == set(PIECES)
    for name, cost in pieces.times.items():
        assert cost.forward > 0, name
        assert cost.backward + cost.weight > 0, name
        assert (cost.weight > 0) == (name in ("qkv", "proj", "fc1", "fc2", "head")), name
    assert pieces.network.gb_per_s > 0
    assert pieces.optimizer_ns > 0
    plan = build_plan("helix", ScheduleRequest(num_layers=4, num_ranks=2, num_microbatches=4))
    assert simulate(plan, costs_of_plan(pieces, plan, Recompute.NONE)).iteration_ms > 0


def test_links_cost_processor_time_only_where_there_are_two_ranks():
    alone = run_on_ranks(1, profile_here, workload())[0]
    assert alone.source.endswith("links not measured")
    assert alone.network.receive_gb_per_s == 0


def test_a_world_that_tensor_ranks_do_not_divide():
    with pytest.raises(AssertionError, match="1 ranks cannot be split into tensor-parallel groups of 2"):
        run_on_ranks(1, profile_here, workload(tensor_parallel=2))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "helixpipe", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=200,
    )  # fmt: skip


@pytest.mark.slow
def test_from_a_model_file_to_a_prediction(tmp_path):
    """The commands as a user runs them: profile, plan, costs, simulate."""
    model, profile, plan, costs = (tmp_path / name for name in ("model", "profile", "plan", "costs"))
    model.write_text(
        "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --swiglu --ffn-hidden-size 128 "
        "--vocab-size 100"
    )
    done = command(
        "profile", "--model", model, "--seq-length", 64, "--fp32", "--repeats", 1, "--output", profile
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("model measured on 1 x ")
    assert Pieces.from_object(json.loads(profile.read_text())).workload.model.num_layers == 4
    sizes = ["--num-layers", 4, "--pipeline-model-parallel-size", 2, "--num-microbatches", 4]
    assert command("plan", "--schedule", "1f1b", *sizes, "--output", plan).returncode == 0
    assert command("costs", "--hardware", profile, "--plan", plan, "--output", costs).returncode == 0
    parse_costs(costs.read_text(), Plan.from_json(plan.read_text()))
    done = command("simulate", "--plan", plan, "--costs", costs)
    assert json.loads(done.stdout)["iteration_ms"] > 0


def test_wrong_sizes_are_refused_before_torch_is_loaded(tmp_path):
    done = command("profile", "--model", "gpt-7b", "--seq-length", 0, "--output", tmp_path / "p.json")
    assert done.returncode == 2
    assert done.stderr == "helixpipe profile: error: argument --seq-length: must be at least 1, not 0\n"
