"""Whole jobs with Transformer Engine's modules, by its stand-in: losses and checkpoints of local ones."""

from __future__ import annotations

import os

import pytest
from jobs import ROOT, metrics_of
from stand_ins import FOLDER
from test_pretrain import LLAMA, column

PATH = os.pathsep.join(map(str, (FOLDER / "engine", ROOT, ROOT / "tests" / "support")))
HELIX = "--pipeline-schedule helix --attention-range block --pipeline-model-parallel-size 2".split()


@pytest.mark.slow
def test_losses_and_checkpoints_are_those_of_local_layers(launch, tmp_path):
    """A job that goes on from the other's checkpoint ends where one that never stopped does."""

    def train(name, *options, **environment):
        file = tmp_path / f"{name}.jsonl"
        finished = launch(2, *HELIX, *LLAMA, "--metrics-jsonl", file, *options, **environment)
        assert finished.code == 0, finished.errors
        assert "attention: aten-cpu" in finished.output
        return metrics_of(file)

    engine = {"PYTHONPATH": PATH}
    expected = train("local", "--transformer-impl", "local")
    found = train("engine", "--save", tmp_path / "engine", "--save-interval", 2, **engine)
    assert column(found, "lm_loss") == pytest.approx(column(expected, "lm_loss"), rel=1e-5)
    assert column(found, "grad_norm") == pytest.approx(column(expected, "grad_norm"), rel=1e-4)
    (tmp_path / "engine" / "latest_checkpointed_iteration.txt").write_text("2", encoding="utf-8")
    resumed = train("resumed", "--transformer-impl", "local", "--load", tmp_path / "engine")
    assert column(resumed, "iteration") == [3, 4]
    assert column(resumed, "lm_loss") == pytest.approx(column(expected, "lm_loss")[2:], rel=1e-5)


def test_a_backend_that_cannot_run_ends_every_rank_with_one_line(launch_alone):
    finished = launch_alone("--attention-backend", "cudnn")
    assert finished.code == 2
    (line,) = finished.errors.splitlines()
    assert line == (
        "pretrain_gpt: rank 0: error: --attention-backend cudnn cannot be used: runs on GPUs only; choose "
        "another, or leave it out to get the fastest that works"
    )
