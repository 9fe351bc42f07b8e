"""What the base install does: everything before training, without torch and megatron-core."""

import subprocess
import sys

import pytest

from helixpipe.__main__ import main

# As if neither were installed: importing a module that is None raises ImportError.
WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(("torch", "megatron", "megatron.core")))
from helixpipe.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
PLAN = ("plan", "--schedule", "helix", "--num-layers", 4, "--pipeline-model-parallel-size", 2)

ADVISE = (
    *("advise", "--model", "llama-7b", "--hardware", "h20", "--seq-length", 32768),
    *("--tensor-model-parallel-size", 8, "--pipeline-model-parallel-size", 4, "--num-microbatches", 8),
)


def helixpipe(*arguments):
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_plans_draws_and_advises_without_torch(tmp_path):
    plan, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    for arguments in (
        (*PLAN, "--num-microbatches", 4, "--output", plan),
        ("draw", "--plan", plan, "--output", picture),
        ADVISE,
    ):
        finished = helixpipe(*arguments)
        assert finished.returncode == 0, finished.stderr
    assert plan.exists()
    assert picture.exists()


def test_what_needs_torch_says_how_to_get_it(tmp_path):
    finished = helixpipe(
        "profile", "--model", "llama-7b", "--seq-length", 128, "--output", tmp_path / "profile.json"
    )
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith("helixpipe profile: error: needs ")
    assert line.endswith("pip install 'helixpipe[train]' brings it")


def test_without_a_command_it_helps(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert "usage: helixpipe" in shown
    assert "advise" in shown


def test_it_tells_its_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("helixpipe ")
