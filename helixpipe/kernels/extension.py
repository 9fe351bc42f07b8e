"""Find the built kernels, see that they run, and say once why they are not used."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import Any

import torch

from helixpipe.kernels import self_test
from helixpipe.kernels.build import CUDA, source_hash


@cache
def load() -> Any | None:
    """The module of the kernels; None, with one warning, if it cannot be used.

    Each kernel is launched once, as a module that can be imported can still be made for a newer driver or
    another GPU. That waits for the GPU: call it before a pipeline runs.
    """
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
    failure = self_test.run(module, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if failure:
        _warn(f"do not work here ({failure})")
        return None
    return module


def _warn(reason: str) -> None:
    warnings.warn(
        f"the CUDA kernels {reason}; torch's operators are used instead. "
        "Build them: python -m helixpipe.kernels",
        RuntimeWarning,
        stacklevel=2,
    )
