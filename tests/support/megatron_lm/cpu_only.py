"""Lets Megatron-LM's own training program run on gloo ranks of a machine without a GPU.

What computes is Megatron's; this stands in for what the program asks of a GPU around it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from helixpipe.megatron_adapter import cpu_backend


class _Stream:
    """Everything is done when it is called."""

    def __init__(self, *args, **options):
        pass

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        pass


def install() -> None:
    """Before megatron.training is imported."""
    if not cpu_backend.install():
        return
    properties = SimpleNamespace(major=9, minor=0, total_memory=1 << 34, name="CPU", multi_processor_count=1)
    values = {
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "get_device_name": "CPU",
        "current_stream": _Stream(),
        "memory_stats": {},
        "mem_get_info": (1 << 33, 1 << 34),
        **dict.fromkeys(
            ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved",
             "device_memory_used"), 0,
        ),
    }  # fmt: skip
    for name, value in values.items():
        setattr(torch.cuda, name, lambda *args, _value=value, **options: _value)
    torch.cuda.Stream = _Stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.set_rng_state = lambda state, *args, **options: torch.set_rng_state(state)
    torch.cuda.empty_cache = lambda: None
    _provide_helpers()

    from megatron.core.datasets import utils as dataset_utils
    from megatron.training import training

    dataset_utils.compile_helpers = lambda: None
    training.initialize_megatron = partial(training.initialize_megatron, allow_no_cuda=True)
    training.set_jit_fusion_options = lambda *args, **options: None


def _provide_helpers() -> None:
    """The wheels' compiled sample builder is for Python 3.12; that of the installed core does the same."""
    name = "megatron.core.datasets.helpers_cpp"
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
        return
    for folder in map(Path, sys.path):
        for path in folder.glob("megatron/core/datasets/helpers_cpp*.so"):
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            with contextlib.suppress(ImportError):
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                sys.modules[name] = module
                return
    raise ImportError(f"no {name} for this Python")
