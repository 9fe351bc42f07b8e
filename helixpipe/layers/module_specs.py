"""What a layer spec says of one module, in whichever form a release of megatron-core says it."""

from __future__ import annotations

from functools import partial
from typing import Any


def class_of(spec: Any) -> Any:
    """The class of the module that a spec builds.

    Args:
        spec: a ``ModuleSpec``, or a partial function of the class, of experts since megatron-core 0.17, or of
            a class method, of MLPs since 0.18.
    """
    if isinstance(spec, partial):
        return getattr(spec.func, "__self__", spec.func)
    return spec.module


def submodules_of(spec: Any) -> Any:
    """What the module that a spec builds is made of, to be changed in place; see :func:`class_of`."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules
