"""Jobs as users start them: real processes, the model that they train, and what they leave behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[2]
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --micro-batch-size 1 "
    "--global-batch-size 4 --train-iters 4 --lr 3e-3 --lr-decay-iters 4 --min-lr 3e-4"
).split()
SCHEDULES = {
    "1f1b": [],
    "interleaved": ["--num-layers-per-virtual-pipeline-stage", 1],
    "zb-h1": [],
    "helix": [],
}


class Finished(NamedTuple):
    """What a job left behind."""

    code: int
    output: str
    errors: str


class Trained(NamedTuple):
    """A job that went well, and the files it wrote."""

    output: str
    errors: str
    rows: list[dict[str, Any]]
    trace_folder: Path


def run(command: list[str], timeout_s: float, **environment: str) -> Finished:
    """Run a command; if it takes too long, kill it and everything that it has started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # By parentage, because torchrun gives every rank a process group of its own.
        for descendant in psutil.Process(process.pid).children(recursive=True):
            descendant.kill()
        process.kill()
        output, errors = process.communicate()
        raise AssertionError(f"hung for {timeout_s} s:\n{output}\n{errors}") from None
    return Finished(process.returncode, output, errors)


def run_example(script: str, folder: Path, *, iterations: int) -> Finished:
    """Run a script of ``examples`` that trains for so many iterations and puts everything into a folder."""
    environment = {"PYTHON": sys.executable, "RUN": str(folder), "ITERS": str(iterations)}
    return run(["bash", str(ROOT / "examples" / script)], 500, **environment)


def _environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(ROOT)} | changes


def search_path(*first: Path) -> str:
    """``PYTHONPATH`` for another process: ``first``, then where these tests have other libraries from."""
    return os.pathsep.join(filter(None, (*map(str, first), os.environ.get("PYTHONPATH"))))


def metrics_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
