"""The operators: checked, chosen by device, known to ``torch.compile`` and meta tensors by their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from helixpipe.kernels import checks, launch, reference
from helixpipe.kernels.extension import load


def _kernels(tensor: Tensor) -> Any | None:
    """The built kernels that compute on a tensor's device with its type, if there are any."""
    return load() if tensor.is_cuda and tensor.dtype is not torch.float64 else None


@custom_op("helixpipe::merge_attention", mutates_args=("output", "log_sum_exp"))
def merge_attention(output: Tensor, log_sum_exp: Tensor, part: Tensor, part_log_sum_exp: Tensor) -> None:
    """Merge attention over some keys with attention of the same queries over others, in place.

    Args:
        output: [b, heads, s, d], laid out in any way that leaves d dense. Of the part's type, or fp32, in
            which many parts are summed up without being rounded in between.
        log_sum_exp: [b, heads, s] of the scores behind ``output``, in fp32. Minus infinity for a query
            without a key (or plus infinity, as FlashAttention-2 says), whose output counts as nothing.
        part: what is added, like ``output``.
        part_log_sum_exp: like ``log_sum_exp``.

    Raises:
        ValueError: other shapes, types or layouts, like every operator here.
    """
    checks.merge_attention(output, log_sum_exp, part, part_log_sum_exp)
    kernels = _kernels(output)
    if kernels is None:
        reference.merge_attention(output, log_sum_exp, part, part_log_sum_exp)
    else:
        launch.merge_attention(kernels, output, log_sum_exp, part, part_log_sum_exp)


@custom_op("helixpipe::swiglu", mutates_args=("out",))
def swiglu(out: Tensor, input: Tensor, bias: Tensor | None = None) -> None:
    """``out = silu(gate) * up``, where ``input + bias`` is gate and up side by side.

    Args:
        out: [.., n], contiguous.
        input: [.., 2n], contiguous.
        bias: [2n] or None.
    """
    checks.swiglu(out, input, bias)
    kernels = _kernels(out)
    if kernels is None:
        reference.swiglu(out, input, bias)
    else:
        launch.activation(kernels, out, input, bias, launch.SWIGLU)


@custom_op("helixpipe::swiglu_backward", mutates_args=("grad_input",))
def swiglu_backward(grad_input: Tensor, grad: Tensor, input: Tensor, bias: Tensor | None = None) -> None:
    """Gradient of :func:`swiglu` by its input; the bias's is the sum of that over rows.

    Args:
        grad_input: [.., 2n]; may be ``input``, which is then overwritten.
        grad: [.., n].
        input, bias: as in the forward.
    """
    checks.swiglu_backward(grad_input, grad, input, bias)
    kernels = _kernels(grad)
    if kernels is None:
        reference.swiglu_backward(grad_input, grad, input, bias)
    else:
        launch.activation_backward(kernels, grad_input, grad, input, bias, launch.SWIGLU)


@custom_op("helixpipe::gelu", mutates_args=("out",))
def gelu(out: Tensor, input: Tensor, bias: Tensor | None = None, approximate: str = "none") -> None:
    """GELU of ``input + bias``.

    Args:
        out, input: [.., n], contiguous.
        bias: [n] or None.
        approximate: ``none`` for the form with erf, or ``tanh``.
    """
    checks.gelu(out, input, bias, approximate)
    kernels = _kernels(out)
    if kernels is None:
        reference.gelu(out, input, bias, approximate)
    else:
        launch.activation(kernels, out, input, bias, launch.GELU[approximate])


@custom_op("helixpipe::gelu_backward", mutates_args=("grad_input",))
def gelu_backward(
    grad_input: Tensor, grad: Tensor, input: Tensor, bias: Tensor | None = None, approximate: str = "none"
) -> None:
    """Gradient of :func:`gelu` by its input, which may be overwritten; all [.., n]."""
    checks.gelu_backward(grad_input, grad, input, bias, approximate)
    kernels = _kernels(grad)
    if kernels is None:
        reference.gelu_backward(grad_input, grad, input, bias, approximate)
    else:
        launch.activation_backward(kernels, grad_input, grad, input, bias, launch.GELU[approximate])


@custom_op("helixpipe::pack", mutates_args=("buffer",))
def pack(buffer: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy tensors one after the other into a buffer, in one launch for up to 16.

    There is no reverse of it: what arrives is used as views of the buffer, and costs nothing.

    Args:
        buffer: [n], contiguous.
        tensors: n elements together, of the same type, laid out in any way.
    """
    checks.pack(buffer, tensors)
    # Which copies, whatever the type.
    kernels = load() if buffer.is_cuda else None
    if kernels is None:
        reference.pack(buffer, tensors)
    else:
        launch.pack(kernels, buffer, tensors)


@custom_op("helixpipe::accumulate", mutates_args=("total",))
def accumulate(total: Tensor, gradient: Tensor) -> None:
    """``total += gradient``.

    Args:
        total: a ``main_grad`` in fp32, contiguous.
        gradient: of the same shape in fp32, fp16 or bf16, contiguous.
    """
    checks.accumulate(total, gradient)
    kernels = _kernels(total)
    if kernels is None:
        reference.accumulate(total, gradient)
    else:
        launch.accumulate(kernels, total, gradient)


for _operator in (
    merge_attention, swiglu, swiglu_backward, gelu, gelu_backward, pack, accumulate,
):  # fmt: skip
    _operator.register_fake(getattr(checks, _operator._name.rpartition("::")[2]))
