"""The table of Megatron's command lines says what is accepted, refused, and what does not fit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "megatron_cases.py"
LINE = {
    "--num-layers": 8, "--hidden-size": 64, "--num-attention-heads": 4, "--seq-length": 64,
    "--max-position-embeddings": 64, "--micro-batch-size": 1, "--global-batch-size": "${BATCH}",
    "--train-iters": 10, "--lr": 0.001, "--lr-warmup-fraction": 0.01, "--data-path": "${DATA}/text",
    "--vocab-file": "${DATA}/vocab.json", "--merge-file": "${DATA}/merges.txt", "--save": None,
    "--use-mcore-models": True, "--transformer-impl": "transformer_engine", "--bf16": None,
    "--tensorboard-dir": "${LOGS}", "--log-params-norm": True, "--pipeline-model-parallel-size": 4,
}  # fmt: skip


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("script_megatron_cases", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")

    def table(**cases):
        path = tmp_path / "cases.json"
        path.write_text(json.dumps({"about": "nothing", "group": cases}))
        assert script.main([str(path), "--ranks", "8", "--set", "BATCH=16"]) == 0
        return capsys.readouterr().out

    return table


def test_every_line_has_its_row(table):
    stages = {**LINE, "--num-layers-per-virtual-pipeline-stage": 1}
    found = table(
        good=LINE,
        stages=stages,
        old={**LINE, "--fp8-format": "hybrid", "--use-mup": True},
        odd={**LINE, "--global-batch-size": 15},
    )
    assert "| good | 8 | 20 | accepted | accepted |" in found
    assert "| stages | 8 | 21 | accepted | accepted, without `--num-layers-per-virtual-" in found
    assert "| old | 8 | 22 | refused: `--fp8-format hybrid`, `--use-mup` | the same |" in found
    assert "| odd | 8 | 20 | refused: --global-batch-size 15 must be a multiple of" in found
    assert "| **4 lines** | | | **2 accepted** | **2 accepted** |" in found
    assert "2 of 83 flags are refused." in found


@pytest.mark.parametrize("text", ["", "[]", '{"group": {"case": 1}}'])
def test_a_file_of_another_form_is_refused(script, tmp_path, capsys, text):
    path = tmp_path / "cases.json"
    path.write_text(text)
    assert script.main([str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"megatron_cases: error: {path} holds no cases (")
