"""Real data files and real torchrun processes for the end-to-end tests."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import MODEL, ROOT, SCHEDULES, Finished, Trained, free_port, metrics_of, run

from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset


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
