"""Attention of one slice of a sequence over the keys and values of earlier ones, to time it.

The same kernels as in :mod:`helixpipe.layers.attention`: the slice's own keys causally, those of its context
without a mask, merged by log-sum-exp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from helixpipe.layers.attention import ForwardResult, choose_backend


class _SliceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, context_key: Tensor, context_value: Tensor
    ) -> Tensor:
        ctx.backend, ctx.scale = choose_backend(query), 1.0 / math.sqrt(query.shape[-1])
        own = ctx.backend.forward(query, key, value, ctx.scale)
        earlier = ctx.backend.forward(query, context_key, context_value, ctx.scale, causal=False)
        own_sum, earlier_sum = (result.log_sum_exp[..., : query.shape[2]] for result in (own, earlier))
        log_sum_exp = torch.logaddexp(own_sum, earlier_sum)
        output = own.output * (own_sum - log_sum_exp).exp().unsqueeze(-1)
        output += earlier.output * (earlier_sum - log_sum_exp).exp().unsqueeze(-1)
        output = output.to(query.dtype)
        ctx.extras = own.extra, earlier.extra
        ctx.save_for_backward(query, key, value, context_key, context_value, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, context_key, context_value, output, log_sum_exp = ctx.saved_tensors
        own, earlier = (ForwardResult(output, log_sum_exp, extra) for extra in ctx.extras)
        grad_query, grad_key, grad_value = ctx.backend.backward(grad, query, key, value, own, ctx.scale)
        through_context, grad_context_key, grad_context_value = ctx.backend.backward(
            grad, query, context_key, context_value, earlier, ctx.scale, causal=False
        )
        return grad_query + through_context, grad_key, grad_value, grad_context_key, grad_context_value


def slice_attention(
    query: Tensor, key: Tensor, value: Tensor, context_key: Tensor, context_value: Tensor
) -> Tensor:
    """Attention of a slice's queries to its context and, causally, to itself.

    Args:
        query: [s, 1, heads, d].
        key, value: [s, 1, groups, d].
        context_key, context_value: [1, groups, c, d], of all earlier tokens.

    Returns:
        [s, 1, heads * d].
    """
    own = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    return _SliceAttention.apply(*own, context_key, context_value).permute(2, 0, 1, 3).flatten(2)
