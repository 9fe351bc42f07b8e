"""The layer benchmark at tiny sizes on a CPU: every part, method and column."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*arguments):
    return subprocess.run(
        [sys.executable, "tools/benchmark_layer.py", "--device", "cpu", "--shapes", "tiny", *arguments],
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
