"""Our wheel beside megatron-core's, in both orders: nothing is overwritten, and nothing is downgraded."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution, files, version
from pathlib import PurePosixPath

import pytest
from megatron_lm_jobs import CORES, unpacked
from packaging.requirements import Requirement
from setuptools import find_namespace_packages
from setuptools.config.pyprojecttoml import load_file
from sources import ROOT
from unpack_cores import VERSIONS

# Shipped by megatron-core from 0.17 on.
LATER = "megatron/training/"


INSTALLED = version("megatron-core")
RELEASES = [INSTALLED, *(pytest.param(name, marks=unpacked(name)) for name in VERSIONS if name != INSTALLED)]


def theirs(release=INSTALLED):
    """Files that a release of megatron-core installs below its packages."""
    if release == INSTALLED:
        paths = files("megatron-core") or ()
        return {str(PurePosixPath(path)) for path in paths if path.parts[0] == "megatron"}
    record = CORES / release / f"megatron_core-{release}.dist-info" / "RECORD"
    with record.open(newline="", encoding="utf-8") as stream:
        return {row[0] for row in csv.reader(stream) if row[0].startswith("megatron/")}


def ours():
    """Files that setuptools finds for us, without building anything."""
    find = load_file(str(ROOT / "pyproject.toml"))["tool"]["setuptools"]["packages"]["find"]
    packages = find_namespace_packages(str(ROOT), include=find["include"])
    return {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package.replace(".", "/")).glob("*.py")
    }


def check(found, release=INSTALLED):
    assert not found & theirs(release)
    assert not [path for path in found if path.startswith(LATER)]
    # A namespace that both share: an __init__.py of either would hide the other's part.
    assert "megatron/__init__.py" not in found


def test_files_of_the_wheel_are_ours_alone():
    found = ours()
    assert {"helixpipe/plan/plan.py", "megatron/pretrain/loop.py"} <= found
    assert "megatron/core/parallel_state.py" in theirs()
    check(found)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("ours_first", [True, False])
def test_no_order_of_installing_and_removing_loses_a_file(release, ours_first):
    """Each file has the contents of the package that was installed last, as pip leaves it."""
    check(ours(), release)
    packages = {"ours": ours(), "theirs": theirs(release)}
    assert len(packages["theirs"]) > 100
    place = {}
    for name in sorted(packages, reverse=not ours_first):
        place |= dict.fromkeys(packages[name], name)
    for name, wanted in packages.items():
        assert {path for path, owner in place.items() if owner == name} == wanted
        # Removing the other one takes its own files away, and no more.
        assert wanted <= place.keys() - packages["theirs" if name == "ours" else "ours"]


def requirements_of_wheel():
    """What the project asks of megatron-core, with every extra."""
    project = load_file(str(ROOT / "pyproject.toml"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values()
                                         for line in extra)]  # fmt: skip
    return [wanted for wanted in map(Requirement, lines) if wanted.name == "megatron-core"]


@pytest.mark.parametrize("release", [INSTALLED, *VERSIONS])
def test_pip_keeps_the_release_that_is_there(release):
    """Beside it, it finds what we ask for: it would replace a release that our requirement leaves out."""
    (wanted,) = requirements_of_wheel()
    assert wanted.specifier.contains(release)
    assert not wanted.specifier.contains("0.20.0")
    assert not wanted.specifier.contains("0.16.0")


@pytest.mark.parametrize("release", [pytest.param(name, marks=unpacked(name)) for name in VERSIONS])
def test_their_metadata_do_not_ask_for_other_versions_of_what_we_need(release):
    """Or one of the two installs would replace what the other one has brought."""
    metadata = PathDistribution(CORES / release / f"megatron_core-{release}.dist-info")
    theirs = {
        wanted.name: wanted for wanted in map(Requirement, metadata.requires or ()) if not wanted.marker
    }
    project = load_file(str(ROOT / "pyproject.toml"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    installed = {wanted.name: version(wanted.name) for wanted in map(Requirement, lines)}
    common = theirs.keys() & installed.keys()
    assert common >= {"torch", "numpy"}
    for name in common:
        assert theirs[name].specifier.contains(installed[name], prereleases=True), theirs[name]


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
    # CUDA kernels, which take minutes where nvcc is, would add a file below helixpipe/kernels.
    environment = os.environ | {"HELIXPIPE_KERNELS": "0"}
    subprocess.run(
        [*command, str(ROOT)], cwd=tmp_path, env=environment, capture_output=True, timeout=200, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    check(set(zipfile.ZipFile(wheel).namelist()))
