"""Versions that all ranks of a job must have in common."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import helixpipe


def versions() -> dict[str, str]:
    """Of Python, torch and megatron-core, and a digest of our own code, by the name to show."""
    return {
        "version of Python": platform.python_version(),
        "version of torch": _version("torch"),
        "version of megatron-core": _version("megatron-core"),
        "code of helixpipe": _digest_of_code(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _digest_of_code() -> str:
    """Of the sources: hosts may have copies of their own, one of them old."""
    folder = Path(helixpipe.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
