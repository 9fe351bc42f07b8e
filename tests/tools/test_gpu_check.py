"""``tools/gpu_check.sh`` on machines that are pretended: an interpreter that keeps what it was asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("build", "kernels", "units", "nccl", "train", "rates", "layer")
INTERPRETER = f"""#!{sys.executable} -SE
import json, os, sys
words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([*words, os.environ["PYTHONPATH"]]) + "\\n")
if "find_nvcc" in words[-1]:
    sys.exit(os.environ.get("NVCC", "0") != "0")
if words[0] == "-W":
    said = ("MISSING", ""), ("GPUS", "1"), ("MACHINE", "2 x H20, Python 3.12"), ("WORKERS", "0")
    print(*(os.environ.get(name, usual) for name, usual in said), sep="\\n")
    sys.exit(0)
paths = [word for word in words if word.startswith(("tests/", "benchmarks/"))]
name = paths[0].split("/")[-1].split(".")[0] if paths else words[1]
found = json.loads(os.environ.get("ENDS", "{{}}")).get(name, ["3 passed, 1 skipped in 2.0s", 0])
print(found[0])
sys.exit(found[1])
"""


@pytest.fixture
def check(tmp_path):
    """``check(*arguments, **environment)``: exit code, lines and the interpreter's calls."""
    interpreter = tmp_path / "python of mine"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    calls = tmp_path / "calls"

    def run(*arguments, ends=None, **environment):
        calls.write_text("")
        mine = {"PYTHON": str(interpreter), "CALLS": str(calls), "ENDS": json.dumps(ends or {})}
        finished = subprocess.run(
            ["bash", "tools/gpu_check.sh", "--output", str(tmp_path / "out put"), *arguments],
            cwd=ROOT,
            env=os.environ | mine | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not finished.stderr
        called = [json.loads(line) for line in calls.read_text().splitlines()]
        return finished.returncode, finished.stdout.splitlines(), called

    return run


def table(lines):
    """Verdict by part, from the table at the end."""
    start = next(i for i, line in enumerate(lines) if line.split() == ["part", "seconds", "verdict"])
    return {line.split()[0]: " ".join(line.split()[2:]) for line in lines[start + 1 : -1]}


def test_without_a_gpu_every_part_is_skipped(check):
    code, lines, called = check(GPUS="0")
    assert code == 0
    assert table(lines) == dict.fromkeys(PARTS, "skipped: no GPU")
    assert lines[-1] == "gpu_check: nothing ran"
    assert len(called) == 1


def test_here_too():
    finished = subprocess.run(
        ["bash", "tools/gpu_check.sh", "nccl"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    lines = finished.stdout.splitlines()
    assert lines[0].startswith("gpu_check: no GPU, Python 3.")
    assert lines[0].endswith("; nothing is missing")
    assert (finished.returncode, table(lines)) == (0, {"nccl": "skipped: no GPU"})


@pytest.mark.parametrize("workers", ["0", "8"])
def test_every_part_on_a_gpu(check, workers):
    code, lines, called = check("--quick", WORKERS=workers)
    assert code == 0
    suites = [words for words in called if "pytest" in words]
    assert len(suites) == 4
    assert all(("-n" in words) == (workers != "0") for words in suites)
    assert lines[0] == "gpu_check: 2 x H20, Python 3.12; nothing is missing"
    found = table(lines)
    assert tuple(found) == PARTS
    assert found["kernels"] == "passed (3 passed, 1 skipped in 2.0s)"
    assert lines[-1] == "gpu_check passed, but for what was skipped"
    rates = next(words for words in called if "benchmarks/rates.py" in words)
    assert rates[-5:-1] == ["--seq-lengths", "2048", "--hardware", "h20"]
    layer = next(words for words in called if "benchmarks/layer.py" in words)
    assert "--quick" in layer
    for words in called:
        for word in words:
            assert not word.startswith(("tests/", "benchmarks/")) or (ROOT / word).exists(), word


@pytest.mark.parametrize(
    ("ends", "part", "verdict"),
    [
        ({"kernels": ["1 failed, 3 passed in 2.0s", 1]}, "kernels", "FAILED with 1"),
        ({"test_nccl": ["no tests ran in 0.1s", 5]}, "nccl", "FAILED: no test ran"),
        ({"layers": ["40 skipped in 0.1s", 0]}, "units", "FAILED: no test ran"),
        ({"layer": ["Traceback", 139]}, "layer", "FAILED with 139"),
        ({"helixpipe.kernels": ["nvcc said no", 1]}, "build", "FAILED with 1"),
    ],
)
def test_a_part_that_fails_is_named_and_the_others_still_run(check, ends, part, verdict):
    code, lines, _ = check(ends=ends)
    found = table(lines)
    assert code == 1
    assert found[part].startswith(verdict)
    assert [name for name, text in found.items() if text.startswith("FAILED")] == [part]
    assert tuple(found) == PARTS
    assert lines[-1] == f"gpu_check failed: {part}"


def test_without_a_compiler_nothing_is_built(check):
    code, lines, _ = check("build", "kernels", NVCC="1")
    assert (code, table(lines)["build"]) == (0, "skipped: no nvcc")


def test_what_is_missing_is_brought_from_a_folder(check, tmp_path):
    wheels = tmp_path / "my wheels"
    wheels.mkdir()
    code, lines, called = check("--wheels", str(wheels), "kernels", MISSING="pytest psutil")
    assert code == 0
    assert lines[0] == f"gpu_check: 2 x H20, Python 3.12; brought pytest psutil from {wheels}"
    (pip,) = (words for words in called if "pip" in words)
    site = str(tmp_path / "out put" / "site")
    assert pip[pip.index("--target") + 1] == site
    assert pip[pip.index("--no-index") :][:5] == [
        "--no-index",
        "--find-links",
        str(wheels),
        "pytest",
        "psutil",
    ]
    assert "--no-deps" in pip
    assert site in next(words for words in called if "tests/kernels" in words)[-1].split(":")


def test_what_cannot_be_brought_is_said_in_the_first_line(check):
    code, lines, called = check(MISSING="pytest psutil", ends={"pip": ["no network", 1]})
    assert code == 2
    (line,) = lines
    assert line.startswith("gpu_check: error: pytest psutil cannot be installed")
    assert line.endswith("give --wheels FOLDER")
    assert len(called) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--wheels"], "needs a folder"),
        (["--wheels", "/no/such"], "is no folder"),
        (["speed"], "no part speed"),
    ],
)
def test_wrong_arguments(check, arguments, words):
    code, lines, called = check(*arguments)
    assert (code, called) == (2, [])
    assert words in lines[0]


def test_without_torch_it_says_so(tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\nexit 1\n")
    interpreter.chmod(0o755)
    finished = subprocess.run(
        ["bash", "tools/gpu_check.sh", "--output", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": str(interpreter)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stdout.splitlines() == [
        f"gpu_check: error: {interpreter} has no torch; set PYTHON to an interpreter that has it"
    ]
