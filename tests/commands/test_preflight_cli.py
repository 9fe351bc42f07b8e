"""``helixpipe preflight``: what it refuses before any rank is waited for, and what it takes from a job."""

from __future__ import annotations

import os
import sys

import pytest
from jobs import ROOT, run

from helixpipe.__main__ import main
from helixpipe.commands import preflight
from helixpipe.plan.simulation.link_needs import LinkNeed
from helixpipe.reliability.exit_codes import BAD_USAGE, PEER_LOST

ROOT_PLAN = "plan --schedule 1f1b --num-layers 4 --pipeline-model-parallel-size 4 --num-microbatches 8"


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    # What the command sets is undone, too.
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--costs costs.json", "--costs needs --plan FILE"),
        ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size needs --plan FILE"),
        ("--hardware h20", "--hardware needs --job"),
        ("--plan plan.json --job --num-layers 4", "give one of them"),
        ("--host n0", "--host, --node-rank and --port belong together"),
        ("--host n0 --node-rank 0", "--host, --node-rank and --port belong together"),
        ("--host n0 --node-rank 1 --port 29500", "--node-rank 1 must be below the 1 nodes"),
        ("--job", "expected the arguments of pretrain_gpt.py"),
    ],
)
def test_what_does_not_belong_together_is_refused(alone, capsys, words, message):
    assert main(["preflight", *words.split()]) == BAD_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("helixpipe preflight: error: ")
    assert message in line


def test_a_node_that_does_not_come_is_named(alone, capsys, free_port):
    nodes = f"--host=127.0.0.1 --host=node-7 --node-rank=0 --port={free_port} --timeout-s=1"
    assert main(["preflight", *nodes.split()]) == PEER_LOST
    assert f"rank 1 on node-7 did not come to 127.0.0.1:{free_port} within 1 s" in capsys.readouterr().err


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_one_rank_alone(alone, capsys):
    assert main(["preflight"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "preflight passed"
    assert "links: ok (one stage sends no messages)" in lines


def test_the_links_and_needs_of_a_plan(tmp_path):
    plan = tmp_path / "plan.json"
    assert main([*ROOT_PLAN.split(), "--output", str(plan)]) == 0
    costs = tmp_path / "costs.json"
    costs.write_text(
        '{"segments": {' + ", ".join(f'"stage{n}": {{"F": 2, "B": 3, "W": 1}}' for n in range(4)) + "}, "
        '"message_bytes": {"*": 4096}, "network": {"latency_ms": 0.1, "gb_per_s": 10}}'
    )
    words = ["preflight", "--plan", str(plan), "--costs", str(costs), "--tensor-model-parallel-size", "2"]
    demand = preflight._demand(_parse(words), 8)
    assert (demand.num_stages, demand.pairs) == (4, {(0, 1), (1, 2), (2, 3)})
    assert (demand.needs[0, 1], demand.needs[1, 0]) == (LinkNeed(2048, 2.0), LinkNeed(2048, 4.0))
    with pytest.raises(ValueError, match="for 4 ranks, of which 6 is no multiple"):
        preflight._demand(_parse(words), 6)


def _parse(words):
    from helixpipe.__main__ import build_parser

    return build_parser().parse_args(words)


LATE = """
import os, sys, time

class Late:
    def find_spec(self, name, path=None, target=None):
        if name == "helixpipe.preflight.table" and os.environ.get("RANK") == "0":
            time.sleep(1)

sys.meta_path.insert(0, Late())
"""


@pytest.mark.slow
def test_the_others_wait_for_the_rank_that_says_what_is_wrong(tmp_path):
    """torchrun ends every rank as soon as one has exited."""
    plan = tmp_path / "plan.json"
    sizes = "--num-layers 4 --pipeline-model-parallel-size 4 --num-microbatches 4".split()
    assert main(["plan", "--schedule", "gpipe", *sizes, "--output", str(plan)]) == 0
    (tmp_path / "sitecustomize.py").write_text(LATE)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = run(
        [sys.executable, *torchrun, "-m", "helixpipe", "preflight", "--plan", str(plan)],
        timeout_s=120,
        PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}",
    )
    assert finished.code
    assert "is for 4 ranks, of which 2 is no multiple" in finished.output + finished.errors
