"""Jobs that are killed and preempted while torchrun watches: they end with the losses of an unbroken run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import MODEL, ROOT, free_port, metrics_of, run

from megatron.training.checkpoint_files import TRACKER, tracked

LEARNED = ("iteration", "lm_loss", "grad_norm", "learning_rate")
# Dropout draws from the random states of tensor- and pipeline-parallel ranks.
LAYOUTS = {
    2: ("--pipeline-schedule", "helix", "--pipeline-model-parallel-size", "2"),
    4: (
        "--pipeline-schedule", "1f1b", "--pipeline-model-parallel-size", "2",
        "--tensor-model-parallel-size", "2", "--use-distributed-optimizer",
    ),
}  # fmt: skip
DEADLINE_S = 200


class Job:
    """pretrain_gpt.py under torchrun, to be disturbed; killed with all it has started when it is left."""

    def __init__(self, corpus: Path, folder: Path, ranks: int, iterations: int, restarts: int, *more: str):
        self.metrics, self.saved = folder / "metrics.jsonl", folder / "saved"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "--max-restarts", str(restarts), "pretrain_gpt.py", *MODEL, "--data-path", str(corpus),
            *LAYOUTS[ranks], "--hidden-dropout", "0.1", "--train-iters", str(iterations),
            "--lr-decay-iters", str(iterations), "--metrics-jsonl", str(self.metrics), "--save",
            str(self.saved), *more,
        ]  # fmt: skip
        # What makes restarts work for those who know it; here they must work without.
        kept = {name: v for name, v in os.environ.items() if name != "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}
        self.output = folder / "output"
        with self.output.open("w") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.end = time.monotonic() + DEADLINE_S

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started():
            process.kill()
        self.process.kill()
        self.process.wait()

    def wait_for_iteration(self, iteration: int) -> bool:
        """True once the metrics reach it; False if the job has ended before."""
        while self.process.poll() is None:
            assert time.monotonic() < self.end, self.output.read_text()
            if self.metrics.exists() and len(self.metrics.read_text().splitlines()) >= iteration:
                return True
            time.sleep(0.01)
        return False

    def wait(self) -> int:
        return self.process.wait(timeout=max(1.0, self.end - time.monotonic()))

    def ranks(self) -> dict[int, psutil.Process]:
        found = {}
        for process in self._started():
            try:
                rank = process.environ().get("RANK")
                if rank is not None and process.parent().pid == self.process.pid:
                    found[int(rank)] = process
            except (psutil.NoSuchProcess, AttributeError):
                continue
        return found

    def _started(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def learned(path):
    return [tuple(row[key] for key in LEARNED) for row in metrics_of(path)]


@pytest.mark.parametrize(
    ("ranks", "kills", "seed"),
    [(2, 2, 1), pytest.param(4, 10, 2, marks=[pytest.mark.slow, pytest.mark.timeout(600)])],
    ids=["twice", "ten times"],
)
def test_killed_at_random_moments_it_ends_as_if_unbroken(corpus, tmp_path, ranks, kills, seed):
    moments, iterations = random.Random(seed), 6 * kills + 4
    (tmp_path / "whole").mkdir()
    with Job(corpus, tmp_path / "whole", ranks, iterations, 0) as whole:
        assert whole.wait() == 0, whole.output.read_text()
    (tmp_path / "broken").mkdir()
    with Job(
        corpus, tmp_path / "broken", ranks, iterations, kills, "--save-interval", "2", "--async-save",
        "--keep-checkpoints", "2",
    ) as broken:  # fmt: skip
        broken.end += 15 * kills
        for kill in range(kills):
            # A later one each time, so that every restart has work left.
            assert broken.wait_for_iteration(6 * kill + moments.randint(1, 6)), broken.output.read_text()
            time.sleep(moments.random() * 0.1)
            victims = broken.ranks()
            victim = victims[moments.choice(sorted(victims))]
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        assert broken.wait() == 0, broken.output.read_text()
    assert learned(broken.metrics) == learned(whole.metrics)
    assert len(learned(whole.metrics)) == iterations
    assert (broken.saved / TRACKER).read_text() == f"{iterations}\n"
    assert broken.output.read_text().count("going on from iteration") >= 1


@pytest.mark.slow
def test_preempted_it_saves_and_the_same_command_goes_on(corpus, tmp_path):
    """torchrun passes SIGTERM to the process group of every rank, readers of data included, and again."""
    iterations = 400
    options = ("--num-workers", "1", "--save-interval", "1000", "--load", str(tmp_path / "saved"))
    with Job(corpus, tmp_path, 2, iterations, 3, *options) as job:
        assert job.wait_for_iteration(3), job.output.read_text()
        job.process.send_signal(signal.SIGTERM)
        for process in job.ranks().values():
            process.send_signal(signal.SIGTERM)
        code = job.wait()
    output = job.output.read_text()
    assert code != 0
    stopped = len(learned(job.metrics))
    assert 3 <= stopped < iterations
    assert f"stopped by SIGTERM after iteration {stopped}: the same command with --load" in output
    assert tracked(job.saved).name == f"iter_{stopped:07d}"
    with Job(corpus, tmp_path, 2, iterations, 0, *options) as job:
        assert job.wait_for_iteration(stopped + 1), job.output.read_text()
    assert f"going on from iteration {stopped} of" in job.output.read_text()


def test_preempted_alone_it_exits_with_75(corpus, tmp_path):
    """SIGUSR1, and SIGTERM on its heels, while it trains."""
    metrics, saved = tmp_path / "metrics.jsonl", tmp_path / "saved"
    (tmp_path / "sitecustomize.py").write_text(
        f"""import os, signal, sys, threading, time
def interrupt():
    while not os.path.exists({str(metrics)!r}) or open({str(metrics)!r}).read().count("\\n") < 2:
        time.sleep(0.01)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        os.kill(os.getpid(), number)
if "pretrain_gpt.py" in sys.orig_argv:  # not in the processes that it starts
    threading.Thread(target=interrupt, daemon=True).start()
"""
    )
    command = [sys.executable, "pretrain_gpt.py", *MODEL, "--data-path", str(corpus), "--train-iters", "1000"]
    command += ["--save", str(saved), "--metrics-jsonl", str(metrics), "--async-save"]
    finished = run(command, 60, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", MASTER_PORT=str(free_port()))
    assert finished.code == 75, finished.errors
    assert finished.errors == ""
    stopped = len(metrics_of(metrics))
    assert finished.output.splitlines()[-2] == f"saved checkpoint {tracked(saved)}"
    assert finished.output.splitlines()[-1].startswith(f"stopped by SIGUSR1 after iteration {stopped}: ")
    assert tracked(saved).name == f"iter_{stopped:07d}"
