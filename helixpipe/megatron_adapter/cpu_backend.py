"""Run megatron.core on a machine without a GPU.

megatron.core names CUDA in three ways that fail on a CPU-only machine: tensors are created with
``device="cuda"`` or moved by ``.cuda()``, the random state of "the GPU" is read and set, and the optimizer
compares type names with ``torch.cuda.FloatTensor``. Each is redirected here and nowhere else.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from helixpipe.contact_points import FACTORIES, LIKE_FACTORIES, find, replace

_CPU = torch.device("cpu")

_installed = False


def install() -> bool:
    """Redirect CUDA to the CPU for megatron.core; does nothing where a GPU is used or the second time.

    Returns:
        True if the CPU backend is in place.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        _redirect_devices()
        _redirect_random_state()
        _redirect_type_names()
        _redirect_counts_of_experts()
        _installed = True
    return True


def _redirect_devices() -> None:
    for name in (*FACTORIES, *LIKE_FACTORIES):
        replace("torch", name, _on_cpu(getattr(torch, name)))
    replace("torch:Tensor", "cuda", lambda self, *args, **kwargs: self)
    replace("torch.nn:Module", "cuda", lambda self, *args, **kwargs: self)
    replace("torch:Tensor", "to", _on_cpu(torch.Tensor.to))
    # megatron.core passes the result on as device=…, so a device does as well as an index.
    replace("torch.cuda", "current_device", lambda: _CPU)
    replace("torch.cuda", "synchronize", lambda device=None: None)
    replace("torch.cuda", "set_device", lambda device: None)
    replace("torch.cuda", "current_stream", lambda device=None: _Stream())
    replace("torch.cuda", "Stream", _Stream)
    replace("torch.cuda", "stream", lambda stream: nullcontext())


class _Stream:
    """Work of a CPU is done when it has been called; an event of the stream is the stream."""

    def wait_stream(self, stream: object) -> None:
        pass

    def record_event(self, event: object = None) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that takes a device so that CUDA means the CPU."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        if len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        # Without an accelerator there is no memory that is pinned for it.
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapper


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _redirect_random_state() -> None:
    """Let the random tracker of tensor parallelism fork the CPU generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    replace("torch.cuda", "get_rng_state", get_state)
    replace("torch.cuda", "manual_seed", torch.manual_seed)
    replace(megatron_random.__name__, "_get_cuda_rng_state", get_state)
    replace(megatron_random.__name__, "_set_cuda_rng_state", set_state)

    # The tracker warns when the CPU generator moves inside a fork; here that generator is the device's.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "RNG state changed" not in record.getMessage()
    )


def _redirect_counts_of_experts() -> None:
    """Megatron makes the plain numbers that a message needs of counts on a GPU only."""

    def on_host(tensor: object, as_numpy: bool = False, record_stream: bool = False) -> object:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    replace("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", on_host)


def _redirect_type_names() -> None:
    """Inside the optimizer functions that ask for CUDA type names, CPU tensors answer to them."""
    name = "clip_grad_by_total_norm_fp32"
    clip = _with_cuda_type_names(getattr(find("megatron.core.optimizer.clip_grads"), name))
    replace("megatron.core.optimizer.clip_grads", name, clip)
    replace("megatron.core.optimizer.optimizer", name, clip)
    for optimizer in (
        "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer",
    ):
        replace(optimizer, "__init__", _with_cuda_type_names(find(optimizer).__init__))


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        original = torch.Tensor.type

        def type_name(tensor: torch.Tensor, *type_args: Any, **type_kwargs: Any) -> Any:
            answer = original(tensor, *type_args, **type_kwargs)
            return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

        undo = replace("torch:Tensor", "type", type_name)
        try:
            return function(*args, **kwargs)
        finally:
            undo()

    return wrapper
