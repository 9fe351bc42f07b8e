"""The example that trains in a checkout of Megatron-LM, with a stand-in for torchrun."""

import os
import subprocess
from pathlib import Path

import pytest

from helixpipe.megatron_lm.options import take_options

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/pretrain_in_megatron_lm.sh"
# Says how it was called, a word a line.
TORCHRUN = """#!/bin/sh
printf '%s\\n' "$PWD" "$PYTHONPATH" "$@"
"""


@pytest.fixture
def start(tmp_path):
    """``start(*words)`` with a checkout whose name has a space."""
    (tmp_path / "a checkout").mkdir()
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text(TORCHRUN)
    torchrun.chmod(0o755)

    def run(*words, **environment):
        path = f"{torchrun.parent}{os.pathsep}{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            ["bash", EXAMPLE, *words], env=kept | {"PATH": path} | environment, text=True, timeout=30,
            capture_output=True, check=False,
        )  # fmt: skip

    return run


def test_their_script_runs_in_their_checkout_through_our_module(start, tmp_path):
    checkout = tmp_path / "a checkout"
    ended = start("/data/two words", "/t.model", "--train-iters", "7", MEGATRON=str(checkout), GPUS="4")
    assert (ended.returncode, ended.stderr) == (0, "")
    folder, path, *words = ended.stdout.splitlines()
    assert folder == str(checkout)
    # Their megatron package is found first.
    assert path == f"{checkout}:{EXAMPLE.parents[1]}"
    launcher = ["--standalone", "--nproc-per-node", "4", "-m", "helixpipe.megatron_lm", "pretrain_gpt.py"]
    assert words[: len(launcher)] == launcher
    rest = words[len(launcher) :]
    assert take_options(rest).schedule == "helix"
    assert not any(word in rest for word in ("--pipeline-schedule", "helix"))
    assert rest[rest.index("--data-path") + 1] == "/data/two words"
    assert rest[rest.index("--tokenizer-model") + 1] == "/t.model"
    assert rest[-2:] == ["--train-iters", "7"]


def test_without_a_checkout_the_usage_is_printed(start):
    for words in ((), ("/data/corpus",), ("/data/corpus", "/t.model")):
        ended = start(*words)
        assert ended.returncode == 1
        assert "usage: MEGATRON=CHECKOUT" in ended.stderr
