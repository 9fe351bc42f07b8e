"""Transformer Engine's modules against Megatron's local ones, and what a broken package does: nothing.

The package is a stand-in, found by processes of their own: megatron.core looks for it when it is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import search_path
from stand_ins import FOLDER

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
# Norm of a gradient's difference over its norm, float32: sums in another order.
TOLERANCE = 1e-6


def run(command, *path, check=True):
    """A Python process that finds ``path`` before everything else; its standard output."""
    environment = os.environ | {"PYTHONPATH": search_path(*path, ROOT, SUPPORT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert not check or finished.returncode == 0, finished.stderr[-3000:]
    return finished


def worker(name):
    output = run([str(SUPPORT / "engine_worker.py"), name], FOLDER / "engine").stdout
    return json.loads(output.splitlines()[-1])


def test_a_model_of_its_modules_trains_like_the_local_one():
    found = worker("single")
    assert found.pop("default")
    assert found.pop("rope")
    # Four weights of two layers and two micro batches; queries and keys of the same, forward and backward.
    assert found.pop("used") == [16, 16]
    # Ours, but for what only its own module has.
    assert found.pop("attention") == ["FlashCoreAttention", "TEDotProductAttention", "TEDotProductAttention"]
    assert len(found) == 2
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.slow
def test_every_range_and_schedule_trains_like_the_local_one():
    """On two ranks, so that weights are borrowed: those are not fused, as they have no ``main_grad``."""
    found = worker("schedules")
    assert len(found) == 14
    assert max(found.values()) <= TOLERANCE, found


BROKEN = {
    "a missing library": ("transformer_engine/__init__.py", "raise OSError('libtransformer_engine.so')"),
    "a part of it": ("transformer_engine/pytorch.py", "raise RuntimeError('built for another torch')"),
    "flash-attn": ("flash_attn/__init__.py", "raise AssertionError('no driver')"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_does_not_end_the_run(tmp_path, case):
    """The program starts, says what is wrong, and builds local layers."""
    file, text = BROKEN[case]
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    (path.parent / "__init__.py").touch()
    path.write_text(text, encoding="utf-8")
    code = (
        "import pretrain_gpt; from helixpipe.layers.spec import *; "
        "assert default_implementation() == LOCAL; "
        "from megatron.core.models.gpt import gpt_layer_specs as specs; assert not specs.HAVE_TE; "
        "check_implementation(LOCAL); check_implementation(TRANSFORMER_ENGINE)"
    )
    finished = run(["-c", code], tmp_path, check=False)
    package, error = path.parent.name, text.removeprefix("raise ").replace("('", ": ").removesuffix("')")
    warning = f"RuntimeWarning: {package} cannot be imported ({error}); the run goes on without it"
    assert warning in finished.stderr
    reason = f"cannot be imported ({error})" if package == "transformer_engine" else "is not installed"
    assert finished.stderr.splitlines()[-1] == (
        f"ValueError: --transformer-impl transformer_engine cannot be used: transformer_engine {reason}; "
        "repair it, or use --transformer-impl local"
    )
