"""What the operators accept: everything else is a ``ValueError`` before any memory is touched.

Each function has an operator's name and arguments, and serves as its fake: all of them write into what they
are given and return nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What kernels compute with, by the code that csrc/numeric.h gives it.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
GELU_FORMS = ("none", "tanh")


def merge_attention(output: Tensor, log_sum_exp: Tensor, part: Tensor, part_log_sum_exp: Tensor) -> None:
    """Outputs [b, heads, s, d], of which d is dense, and log-sum-exps [b, heads, s]."""
    name = "merge_attention"
    _same_device(name, output, log_sum_exp, part, part_log_sum_exp)
    if output.dim() != 4 or output.shape != part.shape:
        raise ValueError(f"{name}: outputs must be [b, heads, s, d] twice, not {_shapes(output, part)}")
    if log_sum_exp.shape != output.shape[:3] or part_log_sum_exp.shape != output.shape[:3]:
        raise ValueError(
            f"{name}: log-sum-exps for outputs {tuple(output.shape)} must be {tuple(output.shape[:3])}, not "
            f"{_shapes(log_sum_exp, part_log_sum_exp)}"
        )
    for tensor in (output, part):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: heads must be contiguous, strides are {tensor.stride()}")
    for tensor in (output, log_sum_exp):
        _check_distinct(name, tensor)
    _check_type(name, output)
    _check_type(name, part)
    sums = torch.float64 if output.dtype is torch.float64 else torch.float32
    if output.dtype not in (part.dtype, sums):
        raise ValueError(f"{name}: cannot merge {part.dtype} into {output.dtype}; sum up in {sums}")
    for tensor in (log_sum_exp, part_log_sum_exp):
        if tensor.dtype is not sums:
            raise ValueError(f"{name}: log-sum-exps must be {sums}, not {tensor.dtype}")


def swiglu(out: Tensor, input: Tensor, bias: Tensor | None = None) -> None:
    """[.., n] from [.., 2n] with a bias [2n]."""
    _check_activation("swiglu", out, [input], bias, 2)


def swiglu_backward(grad_input: Tensor, grad: Tensor, input: Tensor, bias: Tensor | None = None) -> None:
    """[.., 2n] from [.., n] and [.., 2n] with a bias [2n]."""
    _check_activation("swiglu_backward", grad, [grad_input, input], bias, 2)


def gelu(out: Tensor, input: Tensor, bias: Tensor | None = None, approximate: str = "none") -> None:
    """[.., n] from [.., n] with a bias [n]."""
    _check_activation("gelu", out, [input], bias, 1, approximate)


def gelu_backward(
    grad_input: Tensor, grad: Tensor, input: Tensor, bias: Tensor | None = None, approximate: str = "none"
) -> None:
    """[.., n] from [.., n] twice with a bias [n]."""
    _check_activation("gelu_backward", grad, [grad_input, input], bias, 1, approximate)


def _check_activation(
    name: str,
    narrow: Tensor,
    wide: Sequence[Tensor],
    bias: Tensor | None,
    factor: int,
    approximate: str = "none",
) -> None:
    """Contiguous tensors of one type: ``narrow`` [.., n], ``wide`` [.., m], ``bias`` [m], m = factor * n."""
    if approximate not in GELU_FORMS:
        raise ValueError(f"{name}: approximate is one of {', '.join(GELU_FORMS)}, not {approximate!r}")
    others = [*wide] if bias is None else [*wide, bias]
    _same_device(name, narrow, *others)
    for tensor in (narrow, *others):
        _check_type(name, tensor)
        _check_contiguous(name, tensor)
        if tensor.dtype is not narrow.dtype:
            raise ValueError(f"{name}: all tensors must have one type, not {tensor.dtype} and {narrow.dtype}")
    if not narrow.dim():
        raise ValueError(f"{name}: a tensor without dimensions has no rows")
    expected = (*narrow.shape[:-1], factor * narrow.shape[-1])
    for tensor in wide:
        if tensor.shape != expected:
            raise ValueError(
                f"{name}: expected {expected} beside {tuple(narrow.shape)}, not {_shapes(tensor)}"
            )
    if bias is not None and bias.shape != expected[-1:]:
        raise ValueError(f"{name}: expected a bias {expected[-1:]}, not {_shapes(bias)}")


def pack(buffer: Tensor, tensors: Sequence[Tensor]) -> None:
    """A contiguous buffer [n] and tensors of its type with n elements together, laid out in any way."""
    name = "pack"
    _same_device(name, buffer, *tensors)
    _check_contiguous(name, buffer)
    total = sum(tensor.numel() for tensor in tensors)
    if buffer.dim() != 1 or buffer.numel() != total:
        raise ValueError(
            f"{name}: tensors {_shapes(*tensors)} need a buffer ({total},), not {_shapes(buffer)}"
        )
    for tensor in tensors:
        if tensor.dtype is not buffer.dtype:
            raise ValueError(f"{name}: all tensors must have one type, not {tensor.dtype} and {buffer.dtype}")
    if buffer.is_complex() or buffer.is_quantized or buffer.element_size() > 8:
        raise ValueError(f"{name}: {buffer.dtype} is not supported")


def accumulate(total: Tensor, gradient: Tensor) -> None:
    """A contiguous sum in fp32 (fp64 for gradients in fp64) and a contiguous gradient of the same shape."""
    name = "accumulate"
    _same_device(name, total, gradient)
    _check_type(name, gradient)
    _check_contiguous(name, total)
    _check_contiguous(name, gradient)
    expected = torch.promote_types(gradient.dtype, torch.float32)
    if total.dtype is not expected:
        raise ValueError(f"{name}: a sum of {gradient.dtype} must be {expected}, not {total.dtype}")
    if total.shape != gradient.shape:
        raise ValueError(f"{name}: the shapes of sum and gradient differ: {_shapes(total, gradient)}")


def _same_device(name: str, *tensors: Tensor) -> None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"{name}: tensors are on different devices: {', '.join(sorted(map(str, devices)))}")


def has_type(tensor: Tensor) -> bool:
    """True if a tensor is of a type that can be computed with: fp64, too, in torch's operations."""
    return tensor.dtype in TYPES or tensor.dtype is torch.float64


def _check_type(name: str, tensor: Tensor) -> None:
    if not has_type(tensor):
        raise ValueError(f"{name}: {tensor.dtype} is not supported; use fp64, fp32, fp16, bf16")


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: a tensor {tuple(tensor.shape)} with strides {tensor.stride()} is not contiguous; "
            "call contiguous() first"
        )


def _check_distinct(name: str, tensor: Tensor) -> None:
    """No two elements of a tensor that is written share an address."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                raise ValueError(
                    f"{name}: elements of a tensor {tuple(tensor.shape)} with strides {tensor.stride()} "
                    "overlap; it cannot be written"
                )
            reach = stride * (size - 1) + reach


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
