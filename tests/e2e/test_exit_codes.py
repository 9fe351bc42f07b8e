"""What torchrun ends with, and what SLURM sees, for each of our exit codes: real ranks, real torchrun.

srun, sbatch and scontrol are the stand-ins of ``tests/slurm``; docs/faults.md has the table.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from jobs import MODEL, ROOT, metrics_of

from helixpipe.reliability.exit_codes import (
    BAD_DATA,
    BAD_NUMERICS,
    BAD_USAGE,
    HANG,
    OUT_OF_MEMORY,
    PEER_LOST,
    PREEMPTED,
)  # fmt: skip

STAND_INS = ROOT / "tests" / "slurm" / "stand_ins"
FAULTY = ROOT / "tests" / "support" / "faulty_pretrain.py"
HELIX = ("--pipeline-schedule", "helix", "--pipeline-model-parallel-size", "2")
MIDDLE = "1 3 B 5RECV_B3@1"
NO_FAULT = "kill 1 0 B"  # there is no such step


class Slurm:
    """Jobs of two ranks, on one node or on two that are this machine."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.corpus = folder, corpus
        self.records, commands = folder / "records", folder / "commands"
        self.records.mkdir()
        commands.mkdir()
        for name in ("sbatch", "srun", "scontrol", "recording.py"):
            shutil.copy(STAND_INS / name, commands)
        (commands / "torchrun").write_text(
            f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'
        )
        (commands / "torchrun").chmod(0o755)
        self.path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])

    def submit(self, script, *arguments, nodes=("localhost",), **environment) -> subprocess.Popen[str]:
        settings = {
            "STAND_IN_NODES": "\n".join(nodes), "STAND_IN_RECORDS": str(self.records),
            "STAND_IN_SPOOL": str(self.folder), "STAND_IN_GPUS": str(2 // len(nodes)), "STAND_IN_CPUS": "2",
            "STAND_IN_JOB_ID": str(os.getpid() % 8000), "PREFLIGHT": "0", "PATH": self.path,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        return subprocess.Popen(
            ["sbatch", "examples/slurm/job.sh", script, *MODEL, "--data-path", str(self.corpus), *arguments],
            cwd=ROOT,
            env=os.environ | settings | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def requeues(self) -> int:
        return sum(b"requeue".hex() in path.read_text() for path in self.records.glob("scontrol-*"))


@pytest.fixture
def slurm(tmp_path, corpus):
    return Slurm(tmp_path, corpus)


def ended(job, timeout_s=150):
    """Exit code, output and errors."""
    try:
        output, errors = job.communicate(timeout=timeout_s)
    finally:
        for process in psutil.process_iter(["pid"]):
            try:
                if os.getsid(process.pid) == job.pid:
                    process.kill()
            except (psutil.Error, ProcessLookupError, PermissionError):
                continue
    return job.returncode, output, errors


def test_torchrun_ends_with_1_and_slurm_sees_the_ranks_code(slurm, damaged_corpus):
    Path(f"{damaged_corpus}.idx").write_bytes(b"no index")
    code, _, errors = ended(slurm.submit("pretrain_gpt.py", *HELIX, "--data-path", str(damaged_corpus)))
    assert code == BAD_DATA, errors
    # torchrun's own report, which ends with its exception, is what an exit code of 1 comes with.
    assert "ChildFailedError" in errors
    assert not slurm.requeues()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "arguments", "seen", "comes_back"),
    [
        (NO_FAULT, ("--hidden-size", "63"), BAD_USAGE, False),
        (f"raise {MIDDLE}", (), 1, False),
        (f"kill {MIDDLE}", (), PEER_LOST, True),
        (f"stop {MIDDLE}", (), HANG, True),
        (NO_FAULT, ("--lr", "1e30"), BAD_NUMERICS, False),
        ("oom 0 3 F", (), OUT_OF_MEMORY, False),
    ],
    ids=["2", "1", "4", "5", "6", "7"],
)
def test_each_code(slurm, tmp_path, fault, arguments, seen, comes_back):
    environment = {"FAULT": fault, "FAULT_MARK": str(tmp_path / "waits")}
    code, _, errors = ended(
        slurm.submit(
            str(FAULTY), *HELIX, "--failure-dir", str(tmp_path / "failures"), *arguments, **environment
        )
    )
    assert code == seen, errors
    assert "ChildFailedError" in errors
    assert slurm.requeues() == comes_back


@pytest.mark.slow
def test_a_job_whose_time_is_over_saves_and_goes_on_when_it_comes_back(slurm, tmp_path):
    """Two nodes with a rank each, with preflight; the second start trains to the end."""
    metrics, saved = tmp_path / "metrics.jsonl", tmp_path / "saved"
    arguments = (
        *HELIX, "--train-iters", "400", "--lr-decay-iters", "400", "--metrics-jsonl", str(metrics),
        "--save", str(saved), "--load", str(saved),
    )  # fmt: skip
    nodes = ("localhost", "127.0.0.1")
    job = slurm.submit("pretrain_gpt.py", *arguments, nodes=nodes, PREFLIGHT="1")
    end = time.monotonic() + 120
    while not (metrics.exists() and len(metrics_of(metrics)) > 3):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    os.kill(job.pid, signal.SIGUSR1)
    code, output, errors = ended(job)
    assert code == PREEMPTED, errors
    assert "preflight passed" in output
    assert slurm.requeues() == 1
    done = len(metrics_of(metrics))
    arguments = tuple(str(done + 3) if word == "400" else word for word in arguments)
    code, output, errors = ended(slurm.submit("pretrain_gpt.py", *arguments, nodes=nodes))
    assert code == 0, errors
    assert f"going on from iteration {done}" in output
    assert [row["iteration"] for row in metrics_of(metrics)][-1] == done + 3
