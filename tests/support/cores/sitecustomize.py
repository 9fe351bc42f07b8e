"""Lets a megatron-core wheel that asks for Python 3.12 and triton serve under 3.11 and a torch for CPUs.

Python imports this module at its start where its folder is on PYTHONPATH.
"""

import importlib.util
import sys
import typing
from importlib.machinery import PathFinder
from types import ModuleType

# They import triton without asking whether it is there.
NEED_TRITON = ("megatron.core.transformer.moe.paged_stash",)

if not hasattr(typing, "override"):
    # All that Python 3.11 lacks of what these wheels use.
    typing.override = lambda function: function


def stand_ins():
    """Of triton: enough to define kernels, none of which runs on a CPU."""
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    triton.jit = lambda function: function
    triton.language = language
    language.constexpr = object
    return {"triton": triton, "triton.language": language}


class Finder:
    """Shows the stand-ins to those modules only: torch would take them for a compiler."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in NEED_TRITON:
            return None
        spec = PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            sys.modules.update(stand_ins())
            try:
                run(module)
            finally:
                for stand_in in stand_ins():
                    sys.modules.pop(stand_in)

        spec.loader.exec_module = exec_module
        return spec


if importlib.util.find_spec("triton") is None:
    sys.meta_path.insert(0, Finder)
