"""The layer benchmark at tiny sizes on a CPU: every part, method and column."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import layer as layer_script
import pytest
from layer_benchmark.worker import RAN_OUT

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*arguments):
    return subprocess.run(
        [sys.executable, "benchmarks/layer.py", "--device", "cpu", "--shapes", "tiny", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_row_for_every_measurement(tmp_path):
    path = tmp_path / "new" / "results.csv"
    sizes = ["--seq-lengths", "64", "--repeats", "3", "--output", str(path)]
    done = benchmark(*sizes, "--methods", "ours")
    assert done.returncode == 0, done.stderr
    assert "longest sequence: left out" in done.stdout
    rows = rows_of(path)
    assert all(row[name] for row in rows for name in ("date", "python", "torch", "megatron_core", "dtype"))
    (layer,) = (row for row in rows if row["part"] == "layers")
    assert layer["machine"].startswith("CPU")
    assert (layer["method"], layer["seq_length"], layer["samples"]) == ("ours", "64", "3")
    for name in ("forward", "backward"):
        low, middle, high = (float(layer[f"{name}_{key}"]) for key in ("p20", "ms", "p80"))
        assert 0 < low <= middle <= high
    assert int(layer["peak_bytes"]) > 0
    kernels = {row["method"]: row for row in rows if row["part"] == "kernels"}
    assert set(kernels) == {
        "copy", "merge_attention into float32", "swiglu", "swiglu_backward", "gelu tanh", "gelu none",
        "gelu_backward tanh", "gelu_backward none", "pack", "accumulate",
    }  # fmt: skip
    for name, row in kernels.items():
        assert float(row["forward_ms" if name == "copy" else "torch_ms"]) > 0


@pytest.mark.slow
def test_megatrons_own_recomputation_is_measured_too(tmp_path):
    sizes = ["--parts", "layers", "--seq-lengths", "64", "--repeats", "3", "--methods", "selective", "full"]
    path = tmp_path / "results.csv"
    done = benchmark(*sizes, "--output", str(path))
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines()[-2:]] == ["selective", "full"]
    # Without time nothing is begun, which the rows say; they are appended without a second head line.
    done = benchmark(*sizes, "--minutes", "0", "--output", str(path))
    assert done.returncode == 0, done.stderr
    assert [row["note"] for row in rows_of(path)] == ["", "", "out of time", "out of time"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["selective", "ours"])
def test_one_step_of_a_model(method):
    """What a worker does for the longest sequence, but for the GPU's figures."""
    task = {"part": "longest", "shape": "tiny", "seq_length": 256, "method": method, "num_layers": 2}
    done = subprocess.run(
        [sys.executable, "benchmarks/layer.py", "--worker", "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        input=json.dumps(task) + "\n",
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    h, ffn, words = 64, 160, 256
    weights = 2 * (h * (64 + 2 * 32) + h * h + 3 * h * ffn + 2 * h) + h + 2 * words * h
    # Weights and gradients in fp32, Adam's moments and master weights.
    assert found["static_bytes"] == (4 + 4 + 12) * weights
    assert found["step_s"] > 0
    assert found["peak_bytes"] > 0


GIB = 2**30


class PretendedGpu:
    """Answers the tasks of the search as a GPU would whose memory grows linearly with the sequence."""

    def __init__(self, limit, bytes_per_token):
        self.limit, self.bytes_per_token, self.tried = limit, bytes_per_token, []

    def run(self, task, timeout_s):
        assert timeout_s > 0
        assert (task["part"], task["shape"], task["num_layers"]) == ("longest", "7b", 4)
        self.tried.append((task["method"], task["seq_length"]))
        reserved = 10 * GIB + self.bytes_per_token[task["method"]] * task["seq_length"]
        if reserved > self.limit:
            return RAN_OUT
        return {"reserved_bytes": reserved, "limit_bytes": self.limit, "step_s": 1.0}


def search(gpu, monkeypatch, methods=("selective", "ours"), output=None):
    monkeypatch.setattr(layer_script, "Workers", lambda *_, **__: gpu)
    arguments = ["--device", "cpu", "--shapes", "7b", "--methods", *methods]
    arguments += ["--output", str(output)] if output else []
    monkeypatch.setattr(sys, "argv", ["layer.py", *arguments])
    options = layer_script._options()
    run = layer_script._Run(options)
    run.options = SimpleNamespace(**{**vars(options), "device": "cuda"})
    run.longest()


def test_the_longest_sequence_is_found(monkeypatch, capsys, tmp_path):
    gpu = PretendedGpu(140 * GIB, {"selective": GIB // 1024, "ours": GIB // 2560})
    search(gpu, monkeypatch, output=tmp_path / "results.csv")
    said = capsys.readouterr().out
    rows = rows_of(tmp_path / "results.csv")
    assert [(row["method"], int(row["seq_length"])) for row in rows] == gpu.tried
    longest = {}
    for row in rows:
        assert row["note"] == ("" if row["reserved_bytes"] else RAN_OUT)
        if row["reserved_bytes"]:
            longest[row["method"]] = max(longest.get(row["method"], 0), int(row["seq_length"]))
    for method, each in gpu.bytes_per_token.items():
        possible = 130 * GIB // each
        assert 0.93 * possible < longest[method] <= possible
    assert f"ours / selective: {longest['ours'] / longest['selective']:.2f}" in said


def test_a_gpu_that_is_too_small_for_the_first_sequences(monkeypatch, capsys):
    gpu = PretendedGpu(20 * GIB, {"ours": GIB // 1024})
    search(gpu, monkeypatch, methods=["ours"])
    assert "ours       not found: ['out of memory', 'out of memory']" in capsys.readouterr().out
    assert [length for _, length in gpu.tried] == [16384, 32768]
