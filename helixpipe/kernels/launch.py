"""Call the built kernels with tensors that have been checked.

``module`` is the extension for the tensors' device; the one for tests takes the CPU's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from helixpipe.kernels.checks import TYPES

# Codes of csrc/kernels.h.
SWIGLU, GELU = 0, {"tanh": 1, "none": 2}


def merge_attention(
    module: Any, output: Tensor, log_sum_exp: Tensor, part: Tensor, part_log_sum_exp: Tensor
) -> None:
    """See :func:`helixpipe.kernels.operators.merge_attention`."""
    # Threads go along the rows as they lie in memory, [b, heads, s] or [s, b, heads].
    order = sorted(range(3), key=output.stride, reverse=True)

    def strides(tensor: Tensor) -> list[int]:
        return [tensor.stride(axis) for axis in order]

    with torch.cuda.device_of(output):
        module.merge_attention(
            output.data_ptr(), TYPES[output.dtype], strides(output),
            log_sum_exp.data_ptr(), strides(log_sum_exp),
            part.data_ptr(), TYPES[part.dtype], strides(part),
            part_log_sum_exp.data_ptr(), strides(part_log_sum_exp),
            [output.shape[axis] for axis in order], output.shape[3], _stream(output),
        )  # fmt: skip


def activation(module: Any, out: Tensor, input: Tensor, bias: Tensor | None, function: int) -> None:
    """``function``, one of the codes above, of ``input + bias``."""
    with torch.cuda.device_of(out):
        module.activation(
            out.data_ptr(), input.data_ptr(), _address(bias), *_rows(out), TYPES[out.dtype], function,
            _stream(out),
        )  # fmt: skip


def activation_backward(
    module: Any, grad_input: Tensor, grad: Tensor, input: Tensor, bias: Tensor | None, function: int
) -> None:
    """Gradient of :func:`activation`."""
    with torch.cuda.device_of(grad):
        module.activation_backward(
            grad_input.data_ptr(), grad.data_ptr(), input.data_ptr(), _address(bias), *_rows(grad),
            TYPES[grad.dtype], function, _stream(grad),
        )  # fmt: skip


def pack(module: Any, buffer: Tensor, tensors: Sequence[Tensor]) -> None:
    """See :func:`helixpipe.kernels.operators.pack`."""
    # What four dimensions cannot describe is copied first.
    tensors = [t if len(_collapsed(t)) <= 4 else t.contiguous() for t in tensors]
    with torch.cuda.device_of(buffer):
        address, size = buffer.data_ptr(), buffer.element_size()
        for start in range(0, len(tensors), module.most_tensors):
            group = tensors[start : start + module.most_tensors]
            described = [(tensor.data_ptr(), *_description(tensor)) for tensor in group]
            module.pack(address, described, size, _stream(buffer))
            address += size * sum(tensor.numel() for tensor in group)


def accumulate(module: Any, total: Tensor, gradient: Tensor) -> None:
    """See :func:`helixpipe.kernels.operators.accumulate`."""
    with torch.cuda.device_of(total):
        module.accumulate(
            total.data_ptr(), gradient.data_ptr(), total.numel(), TYPES[gradient.dtype], _stream(total)
        )


def _description(tensor: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides in four dimensions, the last of which is dense."""
    axes = _collapsed(tensor)
    axes = [(1, 0)] * (4 - len(axes)) + axes
    return [size for size, _ in axes], [stride for _, stride in axes]


def _collapsed(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of as few dimensions as there can be, the last of which has stride 1."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == stride * size:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if not axes or axes[-1][1] != 1:
        axes.append((1, 1))
    return axes


def _rows(narrow: Tensor) -> tuple[int, int]:
    """Number and length of the rows; empty tensors have none."""
    length = narrow.shape[-1]
    return (narrow.numel() // length if length else 0), length


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
