"""Lets Megatron-LM's own training program run on gloo ranks of a machine without a GPU.

What computes is Megatron's; this stands in for what the program asks of a GPU around it.
"""

from __future__ import annotations

import contextlib
from functools import partial
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

    from megatron.core.datasets import utils as dataset_utils
    from megatron.training import training

    dataset_utils.compile_helpers = lambda: None
    training.initialize_megatron = partial(training.initialize_megatron, allow_no_cuda=True)
    training.set_jit_fusion_options = lambda *args, **options: None
