"""Build the CUDA kernels of ``csrc/``: ``python -m helixpipe.kernels``.

Imports neither torch nor CUDA, so ``setup.py`` and machines without a GPU can use it. What was built is kept
in ``build/kernels``, named by a hash of what it was made from: a second build does nothing.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
KERNELS = ("accumulate", "activation", "merge_attention", "message")

# The GPUs that kernels are compiled for, and an intermediate form for those to come.
_ARCHITECTURES = (
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
)
_FLAGS = ("-std=c++17", "-O3")
# Vectors are read where arrays of their elements were written.
_HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas")

CUDA, HOST = "_cuda", "_host"


class BuildError(Exception):
    """A compiler is missing, or has refused; the message holds what it said."""


def find_nvcc() -> str | None:
    """The compiler of ``CUDA_HOME``, or on the path, or where CUDA is usually installed."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    places = [*(str(Path(home, "bin")) for home in homes), None, "/usr/local/cuda/bin"]
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def library_path(name: str, folder: Path | None = None) -> Path:
    """Where a built module is found by ``import``, or a place of the same name in ``folder``."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    return (folder or Path(__file__).parent) / f"{name}{suffix}"


@cache
def source_hash() -> str:
    """Of everything in ``csrc`` that is compiled; empty where the sources are not, as in a wheel."""
    digest = hashlib.sha256()
    files = sorted(path for path in SOURCES.glob("*") if path.suffix in (".cu", ".cpp", ".h"))
    if not files:
        return ""
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def build(name: str, folder: Path | None = None) -> Path:
    """Compile and link one module, unless that was done from the same sources before.

    Args:
        name: ``CUDA``, or ``HOST`` for the same kernels as loops of the processor, for tests.
        folder: where to put it; where it is imported from if None.

    Returns:
        Its path.

    Raises:
        BuildError: no compiler, or one that reports an error.
    """
    if not source_hash():
        raise BuildError(f"there are no sources in {SOURCES}; build from a checkout of the repository")
    compiler = _compiler(name)
    flags = [*_FLAGS, *_kernel_flags(name)]
    made_from = [source_hash(), compiler, *flags, sysconfig.get_config_var("EXT_SUFFIX")]
    key = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:16]
    built = library_path(name, ROOT / "build" / "kernels" / f"{name.strip('_')}-{key}")
    if not built.exists():
        with tempfile.TemporaryDirectory() as work:
            _publish(_compile(name, compiler, flags, Path(work)), built)
    target = library_path(name, folder)
    _publish(built, target)
    return target


def _compile(name: str, compiler: str, flags: Sequence[str], work: Path) -> Path:
    jobs = [
        [compiler, *flags, "-c", str(SOURCES / f"{kernel}.cu"), "-o", str(work / f"{kernel}.o")]
        for kernel in KERNELS
    ]
    _run([*jobs, _bindings(name, work)])
    objects = [str(work / f"{part}.o") for part in (*KERNELS, "bindings")]
    # The runtime inside the module looks for a driver at the first call only: importing needs none.
    how = ["-shared", "-cudart=static"] if name == CUDA else ["-shared"]
    _run([[compiler, *how, *objects, "-o", str(work / name)]])
    return work / name


def _publish(source: Path, target: Path) -> None:
    """Copy by renaming: another process sees all of it or nothing, and keeps what it has loaded."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def _compiler(name: str) -> str:
    if name == CUDA:
        found = find_nvcc()
        if found is None:
            raise BuildError("nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
        return found
    return _host_compiler()


def _host_compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise BuildError("no C++ compiler was found; install g++ or set CXX")
    return found


def _kernel_flags(name: str) -> list[str]:
    if name == CUDA:
        return [*_ARCHITECTURES, *(f"-Xcompiler={flag}" for flag in _HOST_FLAGS)]
    return ["-x", "c++", *_HOST_FLAGS]


def _pybind11() -> str:
    """The folder of pybind11's headers: its own, or those that torch brings along."""
    own = importlib.util.find_spec("pybind11")
    if own is not None:
        import pybind11

        return str(pybind11.get_include())
    torch = importlib.util.find_spec("torch")
    for folder in torch.submodule_search_locations or () if torch else ():
        if Path(folder, "include", "pybind11").is_dir():
            return str(Path(folder, "include"))
    raise BuildError("pybind11 was not found; run pip install pybind11")


def _bindings(name: str, work: Path) -> list[str]:
    return [
        _host_compiler(), "-std=c++17", "-O0", *_HOST_FLAGS,
        f"-DHELIX_MODULE={name}", f'-DHELIX_SOURCE_HASH="{source_hash()}"',
        f"-I{_pybind11()}", f"-I{sysconfig.get_path('include')}",
        "-c", str(SOURCES / "bindings.cpp"), "-o", str(work / "bindings.o"),
    ]  # fmt: skip


def _run(commands: Sequence[Sequence[str]]) -> None:
    """Run compilers side by side, one per processor."""

    def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for command, finished in zip(commands, pool.map(run, commands), strict=True):
            if finished.returncode:
                said = (finished.stderr or finished.stdout).strip()
                raise BuildError(f"{' '.join(command)}\nended with {finished.returncode}:\n{said}")
