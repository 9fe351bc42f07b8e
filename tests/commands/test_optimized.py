"""Python without assertions: what guards data does so under ``python -O``, too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Tests that expect an error of bad files: pytest.raises is no assertion.
GUARDS = [
    "tests/data/test_prepare_data.py -k damage_of_the_index_is_named or size_of_the_data_is_checked",
    "tests/plan/test_model_files.py -k refused",
    "tests/plan/test_plan_cli.py -k damaged_plans or files_that_are_no_plan",
    "tests/plan/test_simulate.py -k deadlocks",
    "tests/plan/test_json_input.py -k refused or is_no_text",
    "tests/data/test_parquet.py -k what_is_not_there",
    "tests/pretrain/test_checkpoint_files.py -k manifests_that_do_not_fit or names_in_a_manifest",
    "tests/pretrain/test_blends.py -k no_blend_are_refused",
    "tests/pretrain/test_hf_conversion.py -k not_understood or that_do_not_fit or is_exported",
    "tests/pretrain/test_megatron_lm_settings.py -k model_is_compared or not_read_are_refused",
]


@pytest.mark.slow
def test_guards_of_files_hold_without_assertions():
    """One process: most of its time goes to imports."""
    files, words = zip(*(line.split(" -k ") for line in GUARDS), strict=True)
    command = [
        sys.executable,
        "-O",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *files,
        "-k",
        " or ".join(words),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 150


def sources():
    for room in ("helixpipe", "megatron", "tools"):
        yield from sorted((ROOT / room).rglob("*.py"))
    yield ROOT / "pretrain_gpt.py"


def test_no_assertion_is_caught():
    """A program that catches AssertionError has made a check of it, which -O takes away."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler) and node.type is not None
        if "AssertionError" in ast.unparse(node.type)
    ]
    # Megatron asserts that its arguments are set; without assertions it returns None, as is wanted.
    assert [place.partition(":")[0] for place in found] == ["helixpipe/megatron_lm/view.py"]
