"""What each kernel computes, in torch; used where there is no kernel.

Values in 16 bits are computed in fp32 and rounded once, as in the kernels. Arguments: see
:mod:`helixpipe.kernels.operators`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def merge_attention(output: Tensor, log_sum_exp: Tensor, part: Tensor, part_log_sum_exp: Tensor) -> None:
    """Merge a partial attention output into another by the log-sum-exp of their scores."""
    own, other = _seen(log_sum_exp), _seen(part_log_sum_exp)
    merged = torch.logaddexp(own, other)
    total = _share(output, own, merged) + _share(part, other, merged)
    output.copy_(total)
    log_sum_exp.copy_(merged)


def _seen(log_sum_exp: Tensor) -> Tensor:
    """Minus infinity for a row that saw no key, of which FlashAttention-2 says plus infinity."""
    return log_sum_exp.masked_fill(log_sum_exp == math.inf, -math.inf)


def _share(output: Tensor, log_sum_exp: Tensor, merged: Tensor) -> Tensor:
    weight = (log_sum_exp - merged).exp().masked_fill(log_sum_exp == -math.inf, 0.0).unsqueeze(-1)
    # Nothing of a row without weight, whatever stands in it.
    return torch.where(weight == 0, 0.0, output * weight)


def swiglu(out: Tensor, input: Tensor, bias: Tensor | None = None) -> None:
    """``silu(gate) * up``, where ``input + bias`` is ``gate`` and ``up`` side by side."""
    gate, up = _biased(input, bias).chunk(2, dim=-1)
    out.copy_(functional.silu(gate) * up)


def swiglu_backward(grad_input: Tensor, grad: Tensor, input: Tensor, bias: Tensor | None = None) -> None:
    """Gradient of :func:`swiglu`."""
    gate, up = _biased(input, bias).chunk(2, dim=-1)
    grad = _wide(grad)
    # Both before either is written: the gradient may go where the input is.
    found = torch.ops.aten.silu_backward(grad * up, gate), grad * functional.silu(gate)
    for part, value in zip(grad_input.chunk(2, dim=-1), found, strict=True):
        part.copy_(value)


def gelu(out: Tensor, input: Tensor, bias: Tensor | None = None, approximate: str = "none") -> None:
    """GELU of ``input + bias``."""
    out.copy_(functional.gelu(_biased(input, bias), approximate=approximate))


def gelu_backward(
    grad_input: Tensor, grad: Tensor, input: Tensor, bias: Tensor | None = None, approximate: str = "none"
) -> None:
    """Gradient of :func:`gelu`."""
    found = torch.ops.aten.gelu_backward(_wide(grad), _biased(input, bias), approximate=approximate)
    grad_input.copy_(found)


def pack(buffer: Tensor, tensors: Sequence[Tensor]) -> None:
    """The tensors one after the other."""
    torch.cat([tensor.reshape(-1) for tensor in tensors], out=buffer)


def accumulate(total: Tensor, gradient: Tensor) -> None:
    """``total += gradient``."""
    total.add_(gradient)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _biased(input: Tensor, bias: Tensor | None) -> Tensor:
    return _wide(input) if bias is None else _wide(input) + _wide(bias)
