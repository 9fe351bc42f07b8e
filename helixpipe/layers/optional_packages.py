"""Packages that make training faster where they are installed: imported once, hidden if they are broken.

megatron.core imports Transformer Engine and flash-attn wherever it finds them, and expects an ``ImportError``
if they cannot be used. A library that is missing, or built for another CUDA, raises other errors, which end
the run before it begins.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from functools import cache

TRANSFORMER_ENGINE = "transformer_engine"
FLASH_ATTN = "flash_attn"
APEX_ACCUMULATION = "fused_weight_gradient_mlp_cuda"

# What must be importable for the package to be of use.
_PARTS = {
    TRANSFORMER_ENGINE: ("transformer_engine.pytorch",),
    FLASH_ATTN: ("flash_attn.flash_attn_interface",),
    APEX_ACCUMULATION: (),
}


@cache
def why_not_usable(package: str) -> str:
    """Why one of the packages above cannot be used; empty if it can.

    A package that is found but cannot be imported is hidden from everything that asks for it later, with a
    warning that says what is wrong.
    """
    if importlib.util.find_spec(package) is None:
        return "is not installed"
    try:
        for name in (package, *_PARTS[package]):
            importlib.import_module(name)
    # Whatever a broken package raises must not end the run.
    except Exception as error:
        _hide(package)
        first_line = next(iter(str(error).strip().splitlines()), "")
        reason = f"cannot be imported ({type(error).__name__}: {first_line})"
        warnings.warn(
            f"{package} {reason}; the run goes on without it. Repair or uninstall it",
            RuntimeWarning,
            stacklevel=2,
        )
        return reason
    return ""


def hide_broken_packages() -> None:
    """Try all of them; to be called before megatron.core is imported."""
    for package in _PARTS:
        why_not_usable(package)


def _hide(package: str) -> None:
    """Let every import of ``package`` fail as if it were not installed."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]
