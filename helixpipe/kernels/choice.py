"""Where layers use the operators: for what these were made for; all else is torch's and Megatron's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from helixpipe.kernels import operators
from helixpipe.kernels.checks import has_type

SWIGLU = "swiglu"


def gelu_tanh(input: Tensor) -> Tensor:
    """GELU by its approximation with tanh, which GPT-2 and Gemma were trained with."""
    return functional.gelu(input, approximate="tanh")


def quick_gelu(input: Tensor) -> Tensor:
    """GELU by a sigmoid, as Megatron and gpt-oss have it; Megatron's own compiles at its first use."""
    return input * torch.sigmoid(1.702 * input)


def add_gradient(total: Tensor, gradient: Tensor) -> None:
    """``total += gradient``; in one pass of 16-byte accesses where a gradient is added to a sum in fp32."""
    fits = has_type(gradient) and total.dtype is torch.promote_types(gradient.dtype, torch.float32)
    if fits and total.shape == gradient.shape and total.is_contiguous() and gradient.is_contiguous():
        operators.accumulate(total.detach(), gradient.detach())
    else:
        total.add_(gradient)


def fused_form(mlp: Any, tensor: Tensor) -> str | None:
    """The kernel for the activation function of one of Megatron's MLPs.

    Returns:
        ``swiglu``, or GELU's ``none`` or ``tanh``, which Megatron computes with its own fusion; None if
        there is no kernel for it, or not for the type of ``tensor``.
    """
    config = mlp.config
    if not has_type(tensor):
        return None
    if config.use_te_activation_func or config.activation_func_fp8_input_store:
        return None
    if mlp.activation_func == functional.silu and config.gated_linear_unit:
        changed = config.activation_func_clamp_value is not None or config.glu_linear_offset
        return None if changed else SWIGLU
    if mlp.activation_func == gelu_tanh and not config.gated_linear_unit:
        return "tanh"
    if mlp.activation_func == functional.gelu and not config.gated_linear_unit:
        return "tanh" if config.bias_activation_fusion else "none"
    return None


def activate(input: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """The activation function of ``input + bias``, [.., n] or [.., 2n] -> [.., n].

    The backward pass writes its result over ``input``, whose data nobody else may need by then: the output of
    a matrix product. It runs once.
    """
    output: Tensor = _Activate.apply(input, bias, form)
    return output


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, form: str) -> Tensor:
        ctx.save_for_backward(input, bias)
        ctx.form = form
        if form == SWIGLU:
            out = input.new_empty((*input.shape[:-1], input.shape[-1] // 2))
            operators.swiglu(out, input, bias)
        else:
            out = torch.empty_like(input)
            operators.gelu(out, input, bias, form)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        # A second pass would find a tensor that was modified, which autograd refuses.
        input, bias = ctx.saved_tensors
        input = input.detach()
        if ctx.form == SWIGLU:
            operators.swiglu_backward(input, grad.contiguous(), input, bias)
        else:
            operators.gelu_backward(input, grad.contiguous(), input, bias, ctx.form)
        needs_bias = bias is not None and ctx.needs_input_grad[1]
        return input, input.flatten(0, -2).sum(dim=0) if needs_bias else None, None
