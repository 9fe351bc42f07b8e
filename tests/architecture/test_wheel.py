"""Our wheel beside megatron-core's: no file of theirs is ours, in the installed release or a later one."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import files
from pathlib import PurePosixPath

import pytest
from setuptools import find_namespace_packages
from setuptools.config.pyprojecttoml import load_file
from sources import ROOT

# Shipped by megatron-core from 0.17 on.
LATER = "megatron/training/"


def theirs():
    """Files that megatron-core has installed below its packages."""
    return {str(PurePosixPath(path)) for path in files("megatron-core") or () if path.parts[0] == "megatron"}


def ours():
    """Files that setuptools finds for us, without building anything."""
    find = load_file(str(ROOT / "pyproject.toml"))["tool"]["setuptools"]["packages"]["find"]
    packages = find_namespace_packages(str(ROOT), include=find["include"])
    return {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package.replace(".", "/")).glob("*.py")
    }


def check(found):
    assert not found & theirs()
    assert not [path for path in found if path.startswith(LATER)]
    # A namespace that both share: an __init__.py of either would hide the other's part.
    assert "megatron/__init__.py" not in found


def test_files_of_the_wheel_are_ours_alone():
    found = ours()
    assert {"helixpipe/plan/plan.py", "megatron/pretrain/loop.py"} <= found
    assert "megatron/core/parallel_state.py" in theirs()
    check(found)


def test_a_file_of_theirs_is_noticed():
    with pytest.raises(AssertionError):
        check(ours() | {"megatron/core/parallel_state.py"})
    with pytest.raises(AssertionError):
        check(ours() | {"megatron/training/training.py"})


@pytest.mark.slow
def test_the_wheel_itself_holds_no_file_of_theirs(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
    ]
    subprocess.run([*command, str(ROOT)], cwd=tmp_path, capture_output=True, timeout=200, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    check(set(zipfile.ZipFile(wheel).namelist()))
