"""What a job goes on with: weights, optimizer states and random states, by name, under each layout."""

from __future__ import annotations

import pytest
import torch
from ranks import run_on_ranks
from training_worker import Snapshot, run_cases, small_model

SCHEDULES = {
    "1f1b": "--pipeline-schedule 1f1b",
    "helix": "--pipeline-schedule helix --num-fold 1",
    "interleaved": "--pipeline-schedule interleaved --num-layers-per-virtual-pipeline-stage 1",
}
KINDS = {"weight", "exp_avg", "exp_avg_sq", "step"}


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    return f"{small_model(tmp_path_factory.mktemp('corpus'))} --hidden-dropout 0.1"


def run(common, options, folder, pipeline, ranks, layouts):
    """For each of ``layouts``, what a job has that goes on from ``folder``; the first one saves it."""
    cases = []
    for schedule, source in layouts:
        layout = f"{options} --pipeline-model-parallel-size {pipeline} {SCHEDULES[schedule]}"
        files = f"--load {source}" if source else f"--save {folder} --save-interval 2"
        cases.append((f"{layout} {files}", Snapshot(3)))
    by_rank = run_on_ranks(ranks, run_cases, cases, 1, pipeline, common)
    outcomes = [[found[i] for found in by_rank] for i in range(len(cases))]
    assert {outcome["code"] for case in outcomes for outcome in case} == {0}, outcomes
    return [[outcome["seen"] for outcome in case] for case in outcomes]


def learned(case):
    """Of all ranks together: ``{(parameter, kind): elements}``."""
    parts = {}
    for states, _ in case:
        for (name, kind, first), part in states.items():
            before = parts.setdefault((name, kind), {}).setdefault(first, part)
            assert torch.equal(before, part), f"ranks differ in {kind} of {name}"
    whole = {key: torch.cat([found[first] for first in sorted(found)]) for key, found in parts.items()}
    for kind in KINDS:
        # The last stage's copy of tied weights.
        tied = whole.pop(("output_layer.weight", kind), None)
        assert tied is None or torch.equal(tied, whole["embedding.word_embeddings.weight", kind])
    return whole


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert torch.equal(found[key], values), key


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param("", marks=pytest.mark.slow), "--use-distributed-optimizer"],
    ids=["plain", "distributed"],
)
def test_what_was_learned_comes_back_by_name(common, tmp_path, optimizer):
    """Saved by two stages under 1F1B before the third iteration; gone on with by stages, and by replicas."""
    saved = tmp_path / "saved"
    others = [(schedule, tmp_path / "at_2") for schedule in SCHEDULES]
    (whole,) = run(common, optimizer, saved, 2, 2, [("1f1b", None)])
    saved.rename(tmp_path / "at_2")
    tracker = tmp_path / "at_2" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "3\n"
    tracker.write_text("2\n")
    wanted = learned(whole)
    names = {name for name, _ in wanted}
    assert {(name, kind) for name in names for kind in KINDS} == set(wanted)
    assert len(names) == 4 * 12 + 4
    assert all(wanted[name, "exp_avg_sq"].any() for name in names)
    assert {int(wanted[name, "step"]) for name in names} == {2}
    staged = run(common, optimizer, saved, 2, 2, others)
    (replicated,) = run(common, optimizer, saved, 1, 2, others[1:2])
    for case in (*staged, replicated):
        assert_same(learned(case), wanted)
    # Under the same layout the dropout of the iteration has drawn the same, too.
    for rank in range(2):
        (_, drawn), (_, drawn_before) = staged[0][rank], whole[rank]
        assert set(drawn) == set(drawn_before) >= {"torch", "model-parallel-rng"}
        assert all(torch.equal(drawn[name], drawn_before[name]) for name in drawn)
