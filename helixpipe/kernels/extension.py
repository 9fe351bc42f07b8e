"""Find the built kernels, and say once why they are not used."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import Any

from helixpipe.kernels.build import CUDA, source_hash


@cache
def load() -> Any | None:
    """The module of the kernels; None, with one warning, if it cannot be used."""
    try:
        module = importlib.import_module(f"helixpipe.kernels.{CUDA}")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        _warn("were not built" if missing else f"cannot be loaded ({error})")
        return None
    sources = source_hash()
    if sources and module.source_hash != sources:
        _warn("were built from other sources")
        return None
    return module


def _warn(reason: str) -> None:
    warnings.warn(
        f"the CUDA kernels {reason}; torch's operators are used instead. "
        "Build them: python -m helixpipe.kernels",
        RuntimeWarning,
        stacklevel=2,
    )
