"""Run megatron.core on a machine without a GPU.

megatron.core names CUDA in three ways that fail on a CPU-only machine: tensors are created with
``device="cuda"`` or moved by ``.cuda()``, the random state of "the GPU" is read and set, and the optimizer
compares type names with ``torch.cuda.FloatTensor``. Each is redirected here and nowhere else.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")
_LIKE_FACTORIES = ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")

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
        _installed = True
    return True


def _redirect_devices() -> None:
    for name in (*_FACTORIES, *_LIKE_FACTORIES):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.to = _on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    # megatron.core passes the result on as device=…, so a device does as well as an index.
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.set_device = lambda device: None


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that takes a device so that CUDA means the CPU."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        if len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
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

    torch.cuda.get_rng_state = get_state
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state

    # The tracker warns when the CPU generator moves inside a fork; here that generator is the device's.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "RNG state changed" not in record.getMessage()
    )


def _redirect_type_names() -> None:
    """Inside the optimizer functions that ask for CUDA type names, CPU tensors answer to them."""
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    clip = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = clip
    optimizer.clip_grad_by_total_norm_fp32 = clip
    half = optimizer.Float16OptimizerWithFloat16Params
    half.__init__ = _with_cuda_type_names(half.__init__)
    sharded = distrib_optimizer.DistributedOptimizer
    sharded._build_model_and_main_param_groups = classmethod(
        _with_cuda_type_names(sharded._build_model_and_main_param_groups.__func__)
    )


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        original = torch.Tensor.type

        def type_name(tensor: torch.Tensor, *type_args: Any, **type_kwargs: Any) -> Any:
            answer = original(tensor, *type_args, **type_kwargs)
            return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

        torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
        try:
            return function(*args, **kwargs)
        finally:
            torch.Tensor.type = original  # type: ignore[method-assign]

    return wrapper
