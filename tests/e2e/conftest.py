"""Real data files and real torchrun processes for the end-to-end tests."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset

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


def _environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | changes


def metrics_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A prefix with real text: the json and email packages of the standard library."""
    prefix = tmp_path_factory.mktemp("corpus") / "stdlib"
    library = Path(sysconfig.get_path("stdlib"))
    sources = [str(library / "json"), str(library / "email")]
    prepare_dataset(PreparationOptions(sources, str(prefix), pattern="*.py", vocab_size=300, workers=1))
    return prefix


@pytest.fixture
def damaged_corpus(corpus, tmp_path) -> Path:
    """A copy to spoil."""
    for source in corpus.parent.glob(f"{corpus.name}.*"):
        shutil.copy(source, tmp_path)
    return tmp_path / corpus.name


@pytest.fixture(scope="session")
def launch(corpus) -> Callable[..., Finished]:
    """``launch(ranks, *arguments, **environment)``: pretrain_gpt.py under torchrun; later arguments win."""

    def start(
        ranks: int,
        *arguments: object,
        script: Path = ROOT / "pretrain_gpt.py",
        timeout_s: float = 120,
        **environment: str,
    ) -> Finished:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        job = [str(script), *MODEL, "--data-path", str(corpus), *map(str, arguments)]
        return run([sys.executable, *torchrun, *job], timeout_s, **environment)

    return start


@pytest.fixture(scope="session")
def launch_alone(corpus) -> Callable[..., Finished]:
    """``launch_alone(*arguments)``: one rank without torchrun, which starts faster."""

    def start(*arguments: object, timeout_s: float = 60) -> Finished:
        command = [sys.executable, "pretrain_gpt.py", *MODEL, "--data-path", str(corpus)]
        return run([*command, *map(str, arguments)], timeout_s, MASTER_PORT=str(free_port()))

    return start


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def trained(launch, tmp_path_factory) -> Callable[[str], Trained]:
    """``trained(schedule)``: the same four iterations on two ranks under a schedule, run once per session."""
    runs: dict[str, Trained] = {}

    def train(schedule: str) -> Trained:
        if schedule not in runs:
            folder = tmp_path_factory.mktemp(schedule)
            finished = launch(
                2, "--pipeline-schedule", schedule, "--pipeline-model-parallel-size", 2, *SCHEDULES[schedule],
                "--metrics-jsonl", folder / "metrics.jsonl", "--trace-dir", folder / "trace",
                "--eval-iters", 1, "--eval-interval", 2,
            )  # fmt: skip
            assert finished.code == 0, finished.errors
            rows = metrics_of(folder / "metrics.jsonl")
            runs[schedule] = Trained(finished.output, finished.errors, rows, folder / "trace")
        return runs[schedule]

    return train
