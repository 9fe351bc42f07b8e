"""The SLURM scripts with stand-ins for SLURM's commands and torchrun, which keep how they were called."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from helixpipe.reliability import exit_codes

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = Path(__file__).resolve().parent / "stand_ins"
SCRIPTS = sorted([*ROOT.glob("examples/**/*.sh"), *ROOT.glob("tools/*.sh"), ROOT / ".ci" / "run"])
BATCH = "examples/pretrain_llama_7b_slurm.sh"
JOB = "examples/slurm/job.sh"
NASTY = (
    "two words", "it's", 'say "yes"', "a;touch pwned", "$(touch pwned)", "`touch pwned`", "line\nbreak", "*",
    "", "-leading", "--name=a b", "back\\slash", "$HOME", "\udcff\udcfe",
)  # fmt: skip
NODES = {
    1: ["node-0"],
    2: ["gpu node 1", "--gpu-2"],
    8: [f"rack-1-{number}.example.org" for number in range(8)],
}


class Call(NamedTuple):
    arguments: list[str]
    environment: dict[str, str]
    folder: str

    @classmethod
    def read(cls, path: Path) -> Call:
        found = json.loads(path.read_text())

        def text(value: str) -> str:
            return os.fsdecode(bytes.fromhex(value))

        environment = {text(key): text(value) for key, value in found["environment"].items()}
        return cls([text(value) for value in found["arguments"]], environment, found["folder"])


class Ended(NamedTuple):
    code: int
    output: str
    errors: str
    calls: dict[str, list[Call]]

    def torchruns(self, *, preflight: bool) -> list[Call]:
        """By node."""
        calls = [
            call for call in self.calls.get("torchrun", []) if ("preflight" in call.arguments) is preflight
        ]
        return sorted(calls, key=lambda call: int(call.environment["SLURM_NODEID"]))

    @property
    def requeues(self) -> list[list[str]]:
        calls = self.calls.get("scontrol", [])
        return [call.arguments for call in calls if call.arguments[0] == "requeue"]


@pytest.fixture
def checkout(tmp_path):
    """The scripts in a folder whose name has a space and a dash."""
    folder = tmp_path / "- my checkout"
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


@pytest.fixture
def submit(checkout, tmp_path):
    """``submit(script, *arguments, nodes=, during=, **settings)``: sbatch to its end."""

    def run(script, *arguments, nodes=1, during=None, environment=None, **settings):
        records, spool = tmp_path / "records", tmp_path / "spool"
        records.mkdir()
        spool.mkdir()
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMP_", "CUDA_", "PYTORCH_"))
        }
        mine = {
            "PATH": os.pathsep.join([str(STAND_INS), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "STAND_IN_NODES": "\n".join(NODES[nodes]),
            "STAND_IN_RECORDS": str(records),
            "STAND_IN_SPOOL": str(spool),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        process = subprocess.Popen(
            ["sbatch", script, *arguments],
            cwd=checkout,
            env=kept | mine | {f"STAND_IN_{k}": v for k, v in settings.items()} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        try:
            if during is not None:
                during(process, records)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        calls: dict[str, list[Call]] = {}
        for path in sorted(records.glob("*-*-*")):
            calls.setdefault(path.name.partition("-")[0], []).append(Call.read(path))
        return Ended(process.returncode, output, errors, calls)

    return run


def after(words, word):
    return words[words.index(word) + 1]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(["shellcheck", "-x", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not found.stdout


@pytest.mark.parametrize("nodes", NODES)
def test_every_node_starts_its_ranks_with_the_arguments_as_given(submit, checkout, nodes):
    ended = submit(JOB, "my train.py", *NASTY, nodes=nodes, JOB_ID="8123")
    assert (ended.code, ended.errors) == (0, "")
    for preflight in (True, False):
        calls = ended.torchruns(preflight=preflight)
        assert len(calls) == nodes
        for call in calls:
            assert call.arguments[-len(NASTY) :] == list(NASTY)
            assert call.folder == str(checkout)
    for call in ended.torchruns(preflight=False):
        assert call.arguments[-len(NASTY) - 1] == "my train.py"
    assert not [path for path in (*checkout.iterdir(), *Path("/").glob("pwned")) if path.name == "pwned"]
    assert_started(ended, nodes, job=8123)


def assert_started(ended, nodes, job):
    (srun,) = ended.calls["srun"]
    wanted = {f"--nodes={nodes}", f"--ntasks={nodes}", "--cpus-per-task=64", "--kill-on-bad-exit=1"}
    assert wanted <= set(srun.arguments)
    port = 15000 + 2 * (job % 8000)
    for node, call in enumerate(ended.torchruns(preflight=True)):
        words = call.arguments
        assert "--standalone" in words
        assert (after(words, "--nproc-per-node"), after(words, "--node-rank")) == ("8", str(node))
        assert [word for word in words if word.startswith("--host=")] == [f"--host={n}" for n in NODES[nodes]]
        assert after(words, "--port") == str(port)
    for node, call in enumerate(ended.torchruns(preflight=False)):
        words = call.arguments
        assert (after(words, "--nnodes"), after(words, "--node-rank")) == (str(nodes), str(node))
        assert (after(words, "--master-addr"), after(words, "--master-port")) == (
            NODES[nodes][0],
            str(port + 1),
        )
        assert after(words, "--nproc-per-node") == "8"


def test_the_environment_of_ranks(submit):
    ended = submit(JOB, "pretrain_gpt.py", nodes=2, environment={"CUDA_DEVICE_MAX_CONNECTIONS": "8"})
    for call in ended.calls["torchrun"]:
        found = call.environment
        # 64 cores, which srun does not pass on by itself, over 8 ranks.
        assert found["OMP_NUM_THREADS"] == "8"
        assert found["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
        assert found["CUDA_MODULE_LOADING"] == "EAGER"
        assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == "8", "what the user has set stays"


@pytest.mark.parametrize("nodes", [2])
def test_the_llama_job_with_paths_of_any_kind(submit, nodes):
    data, saved = "/my data/-corpus; $(reboot)", "/my 'checkpoints'/7b"
    ended = submit(BATCH, data, saved, "--train-iters", "7", nodes=nodes)
    assert (ended.code, ended.errors) == (0, "")
    assert_started(ended, nodes, job=123456)
    for call in ended.torchruns(preflight=False):
        words = call.arguments
        assert after(words, "--data-path") == data
        assert (after(words, "--save"), after(words, "--load")) == (saved, saved)
        assert after(words, "--metrics-jsonl") == f"{saved}/metrics.jsonl"
        assert words[-2:] == ["--train-iters", "7"]


def test_both_batch_scripts_ask_slurm_for_the_same():
    def wanted(path):
        lines = (ROOT / path).read_text().splitlines()
        return {line for line in lines if line.startswith("#SBATCH")}

    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@300"} <= wanted(JOB) <= wanted(BATCH)


@pytest.mark.parametrize("code", ["2", "5", "75"])
def test_slurm_sees_the_code_of_the_ranks(submit, code):
    ended = submit(JOB, "pretrain_gpt.py", CODES=code)
    assert ended.code == int(code)
    assert ended.requeues == ([["requeue", "123456"]] if code == "5" else [])


def test_the_launcher_knows_every_exit_code():
    known = {v for k, v in vars(exit_codes).items() if k.isupper() and isinstance(v, int)}
    (codes,) = re.findall(r"for code in ([\d ]+); do", (ROOT / JOB).read_text())
    assert {int(code) for code in codes.split()} == known | {1}


@pytest.mark.parametrize(("codes", "seen"), [("4 2", 2), ("7 4", 7), ("4 -9", 4), ("-9 -9", 1)])
def test_a_rank_that_was_held_up_does_not_hide_the_cause(submit, codes, seen):
    assert submit(JOB, "pretrain_gpt.py", nodes=2, CODES=codes).code == seen


def test_a_failed_preflight_ends_the_job(submit):
    ended = submit(JOB, "pretrain_gpt.py", nodes=2, PREFLIGHT="8")
    assert ended.code == 8
    assert not ended.torchruns(preflight=False)
    assert not ended.requeues


def test_preflight_can_be_left_out(submit):
    ended = submit(JOB, "pretrain_gpt.py", environment={"PREFLIGHT": "0"})
    assert not ended.torchruns(preflight=True)
    assert ended.torchruns(preflight=False)


def test_a_lost_rank_brings_the_job_back_a_few_times_only(submit):
    ended = submit(JOB, "pretrain_gpt.py", CODES="4", environment={"SLURM_RESTART_COUNT": "3"})
    assert (ended.code, ended.requeues) == (4, [])


def signal_once_ranks_listen(nodes, number):
    def during(process, records):
        end = time.monotonic() + 40
        while len(list(records.glob("listens_*"))) < nodes:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.02)
        # SLURM's B: asks for the batch shell alone.
        os.kill(process.pid, number)

    return during


def test_at_the_end_of_its_time_every_rank_saves_and_the_job_comes_back(submit):
    ended = submit(
        JOB, "pretrain_gpt.py", nodes=2, CODES="signal", during=signal_once_ranks_listen(2, signal.SIGUSR1)
    )
    assert ended.code == 75
    assert ended.requeues == [["requeue", "123456"]]
    assert "queued again: its time is over" in ended.output


def test_a_rank_that_does_not_listen_yet_goes_on(submit):
    """It has nothing to save, and would be lost to a signal that nobody handles."""
    ended = submit(JOB, "pretrain_gpt.py", CODES="early", during=signal_once_ranks_listen(1, signal.SIGUSR1))
    assert (ended.code, ended.requeues) == (0, [])


def test_a_job_that_is_cancelled_does_not_come_back(submit):
    def during(process, records):
        signal_once_ranks_listen(1, signal.SIGTERM)(process, records)
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGUSR1)

    assert not submit(JOB, "pretrain_gpt.py", CODES="signal", during=during).requeues


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"NUM_NODES": "3"}, "scontrol names 2 hosts in node[0-7], the job has 3 nodes"),
        ({"JOB_ID": ""}, "submit it with sbatch"),
    ],
)
def test_what_cannot_work_is_refused(submit, settings, words):
    ended = submit(JOB, "pretrain_gpt.py", nodes=2, **settings)
    assert ended.code == 2
    assert words in ended.errors
    assert "srun" not in ended.calls


def test_nothing_is_left_in_the_checkout(submit, checkout):
    before = set(checkout.rglob("*"))
    submit(JOB, "pretrain_gpt.py", CODES="3")
    assert set(checkout.rglob("*")) == before
