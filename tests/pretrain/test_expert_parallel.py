"""Experts that ranks share out: what is learned, what checkpoints hold, and what replicas have in common."""

from __future__ import annotations

import json

import pytest
import torch
from ranks import run_on_ranks
from training_worker import Fault, Snapshot, run_cases, small_model

EXPERTS = (
    "--num-experts 4 --moe-ffn-hidden-size 24 --disable-bias-linear --swiglu --moe-aux-loss-coeff 0.1 "
    "--moe-z-loss-coeff 0.001 --moe-token-dispatcher-type alltoall --log-params-norm"
)
# With two ranks of helix the first has no MLP with experts, and no weights in the optimizer of these.
SOME = "--moe-layer-freq 2 --use-distributed-optimizer --overlap-grad-reduce"
HELIX = "--pipeline-schedule helix --num-fold 1 --pipeline-model-parallel-size 2"


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    return f"{small_model(tmp_path_factory.mktemp('corpus'))} {EXPERTS}"


def run(common, ranks, pipeline, expert, options, fault=None):
    """What each rank has seen of one job."""
    words = f"--expert-model-parallel-size {expert} {options}"
    outcomes = run_on_ranks(ranks, run_cases, [(words, fault or Fault())], 1, pipeline, common, 1, expert)
    return [outcome for (outcome,) in outcomes]


def learned(outcomes):
    """``{(parameter, kind): elements}`` of all ranks together; those who have the same must agree."""
    parts = {}
    for outcome in outcomes:
        states, _ = outcome["seen"]
        for (name, kind, first), part in states.items():
            before = parts.setdefault((name, kind), {}).setdefault(first, part)
            assert torch.equal(before, part), f"ranks differ in {kind} of {name}"
    return {key: torch.cat([found[first] for first in sorted(found)]) for key, found in parts.items()}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["", "--use-distributed-optimizer"], ids=["plain", "distributed"])
def test_experts_come_back_on_other_ranks(common, tmp_path, optimizer):
    """Saved by two ranks with two experts each; gone on with by stages, and by replicas, that have all."""
    saved, moved = tmp_path / "saved", tmp_path / "at_2"
    found = run(common, 2, 1, 2, f"{optimizer} --save {saved} --save-interval 2", Snapshot(3))
    assert {outcome["code"] for outcome in found} == {0}, found
    wanted = learned(found)
    names = {name for name, _ in wanted}
    assert sum(".experts.local_experts.3." in name for name in names) == 2 * 4
    assert all(wanted[name, "exp_avg_sq"].any() for name in names)
    saved.rename(moved)
    (moved / "latest_checkpointed_iteration.txt").write_text("2\n")
    for pipeline, options in ((2, HELIX), (1, "")):
        again = run(common, 2, pipeline, 1, f"{optimizer} {options} --load {moved}", Snapshot(3))
        assert {outcome["code"] for outcome in again} == {0}, again
        assert learned(again).keys() == wanted.keys()
        assert all(torch.equal(states, wanted[key]) for key, states in learned(again).items())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["", "--use-distributed-optimizer"], ids=["plain", "distributed"])
def test_a_rank_without_experts_saves_and_loads_for_those_that_have_some(common, tmp_path, optimizer):
    """Rank 0 says how often an optimizer has stepped; its own of experts has no weights under helix."""
    some = f"{optimizer} --moe-layer-freq 2"
    saved, moved = tmp_path / "saved", tmp_path / "at_2"
    metrics = [tmp_path / name for name in ("first", "helix", "1f1b")]
    first = f"{some} {HELIX} --save {saved} --save-interval 2 --metrics-jsonl {metrics[0]}"
    found = run(common, 2, 2, 1, first, Snapshot(3))
    assert {outcome["code"] for outcome in found} == {0}, found
    wanted = learned(found)
    assert sum(".experts.local_experts.3." in name for name, kind in wanted if kind == "exp_avg") == 2 * 2
    saved.rename(moved)
    (moved / "latest_checkpointed_iteration.txt").write_text("2\n")
    for pipeline, options, path in ((2, HELIX, metrics[1]), (1, "", metrics[2])):
        words = f"{some} {options} --load {moved} --metrics-jsonl {path}"
        again = run(common, 2, pipeline, 1, words, Snapshot(3))
        assert {outcome["code"] for outcome in again} == {0}, again
        assert learned(again).keys() == wanted.keys()
        assert all(torch.equal(states, wanted[key]) for key, states in learned(again).items())
        # The norm of the weights after the third step, which goes by how many there were.
        assert numbers(path) == pytest.approx(numbers(metrics[0])[-5:], rel=1e-6)


def numbers(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = ("lm_loss", "grad_norm", "params_norm", "load_balancing_loss", "router_z_loss")
    return [row[name] for row in rows for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["", "--use-distributed-optimizer --overlap-grad-reduce", SOME])
def test_losses_and_norms_are_those_of_ranks_with_all_experts(common, tmp_path, optimizer):
    """Of each layer's experts, two ranks have two; helix does the same with two stages."""
    found = {}
    for name, (ranks, pipeline, expert, options) in {
        "all": (2, 1, 1, ""),
        "shared": (2, 1, 2, ""),
        "helix": (4, 2, 2, f"{HELIX} --attention-range block --head-placement spread"),
    }.items():
        metrics = tmp_path / name
        words = f"{optimizer} {options} --metrics-jsonl {metrics}"
        outcomes = run(common, ranks, pipeline, expert, words)
        assert {outcome["code"] for outcome in outcomes} == {0}, outcomes
        found[name] = numbers(metrics)
    assert len(found["all"]) == 15
    # A mean over the layers that have experts: not much less than 1, whatever they learn.
    assert all(balance > 0.9 for balance in found["all"][3::5])
    assert found["shared"] == pytest.approx(found["all"], rel=1e-5)
    assert found["helix"] == pytest.approx(found["all"], rel=1e-5)


@pytest.mark.slow
def test_biases_of_experts_count_once_in_every_layout(common, tmp_path):
    """Tensor-parallel ranks have other experts, or the same ones: no bias is another's copy."""
    found = {}
    biased = common.replace("--disable-bias-linear ", "")
    for name, (ranks, tensor, expert) in {"alone": (1, 1, 1), "same": (2, 2, 1), "other": (2, 2, 2)}.items():
        metrics = tmp_path / name
        words = (
            f"--expert-tensor-parallel-size 1 --expert-model-parallel-size {expert} --metrics-jsonl {metrics}"
        )
        words += " --sequence-parallel --tensor-model-parallel-size 2" if tensor == 2 else ""
        outcomes = run_on_ranks(ranks, run_cases, [(words, Fault())], tensor, 1, biased, 1, expert, 1)
        assert {outcome["code"] for (outcome,) in outcomes} == {0}, outcomes
        found[name] = numbers(metrics)
    assert found["same"] == pytest.approx(found["alone"], rel=1e-5)
    assert found["other"] == pytest.approx(found["alone"], rel=1e-5)
