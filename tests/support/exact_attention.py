"""Attention with explicit scores in float64: what every backend and every stand-in is held against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output [b, heads, s, d] and log-sum-exp [b, heads, s] of query over key and value [b, groups, t, d]."""
    scores, value = _scores(query, key, scale, causal, softcap)[0], _repeated(value, query)
    log_sum_exp = scores.logsumexp(dim=-1)
    return (scores - log_sum_exp[..., None]).exp() @ value, log_sum_exp


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    causal: bool,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by output and log-sum-exp as they are given: they may be those over more keys."""
    shared = query.shape[1] // key.shape[1]
    grad, output = grad.double(), output.double()
    scores, slope = _scores(query, key, scale, causal, softcap)
    probabilities = (scores - log_sum_exp.double()[..., None]).exp()
    grad_value = probabilities.transpose(2, 3) @ grad
    grad_probabilities = grad @ _repeated(value, query).transpose(2, 3)
    grad_scores = probabilities * (grad_probabilities - (grad * output).sum(dim=-1, keepdim=True))
    grad_scores *= slope * scale
    grad_query = grad_scores @ _repeated(key, query)
    grad_key = grad_scores.transpose(2, 3) @ query.double()
    return (grad_query, *(t.unflatten(1, (-1, shared)).sum(dim=2) for t in (grad_key, grad_value)))


def forward_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bounds: Sequence[tuple[int, int]],
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same for packed sequences, [1, heads, T, d], each causal."""
    parts = [
        forward(*(tensor[:, :, first:last] for tensor in (query, key, value)), scale, True, softcap)
        for first, last in bounds
    ]
    outputs, sums = zip(*parts, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def backward_packed(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    bounds: Sequence[tuple[int, int]],
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for packed sequences."""
    parts = [
        backward(
            *(tensor[:, :, first:last] for tensor in (grad, query, key, value, output)),
            log_sum_exp[:, :, first:last],
            scale,
            True,
            softcap,
        )
        for first, last in bounds
    ]
    grad_query, grad_key, grad_value = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
    return grad_query, grad_key, grad_value


def _scores(query: Tensor, key: Tensor, scale: float, causal: bool, softcap: float) -> tuple[Tensor, Tensor]:
    """Scores, and the slope of the cap at each."""
    scores = query.double() @ _repeated(key, query).transpose(2, 3) * scale
    slope = torch.ones_like(scores)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
        slope = 1 - (scores / softcap) ** 2
    if causal:
        assert query.shape[2] == key.shape[2]
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return scores, slope


def _repeated(tensor: Tensor, query: Tensor) -> Tensor:
    return tensor.double().repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)
