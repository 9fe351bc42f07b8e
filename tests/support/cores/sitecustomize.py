"""Lets a megatron-core wheel that asks for Python 3.12 and triton serve under 3.11 and a torch for CPUs.

Python imports this module at its start where its folder is on PYTHONPATH.
"""

import importlib.util
import sys
import sysconfig
import typing
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

# Compiled for Python 3.12; that of the installed core does the same.
HELPERS = "megatron.core.datasets.helpers_cpp"

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


class HelpersFinder:
    """Asked after all others."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != HELPERS:
            return None
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        places = [Path(folder) / f"{HELPERS.replace('.', '/')}{suffix}" for folder in sys.path]
        found = next((place for place in places if place.exists()), None)
        return None if found is None else importlib.util.spec_from_file_location(name, found)


if importlib.util.find_spec("triton") is None:
    sys.meta_path.insert(0, Finder)
sys.meta_path.append(HelpersFinder)
