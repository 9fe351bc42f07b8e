"""A tiny run of an attention backend, forward and backward, held against explicit scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy

import torch
from torch import Tensor

from helixpipe.layers.attention.interface import AttentionBackend, AttentionProblem, ForwardResult, Spans

_LENGTH, _CONTEXT = 33, 47
# Two 16-bit kernels differ by less than a hundredth; wrong arguments change results by their own size.
_TOLERANCE = 0.03
_SCALE = 0.3
# Of the size of the scores, so that one that is not applied shows.
_SOFTCAP = 2.0


def run_trial(backend: AttentionBackend, problem: AttentionProblem) -> str:
    """What the backend computes wrongly; empty if everything is right.

    The uses are those of training: whole sequences, queries over earlier keys, and packed sequences.

    Raises:
        Exception: whatever the backend raises.
    """
    backend = copy(backend)
    backend.softcap = _SOFTCAP if problem.softcap else 0.0
    whole = _Inputs(problem, batch=2, queries=_LENGTH, keys=_LENGTH)
    wrong = whole.errors_of(backend, causal=True)
    if not wrong and problem.varies:
        context = _Inputs(problem, batch=1, queries=_LENGTH, keys=_CONTEXT)
        packed = _Inputs(problem, batch=1, queries=_LENGTH, keys=_LENGTH)
        spans = Spans([(0, 1), (1, 6), (6, _LENGTH)])
        wrong = context.errors_of(backend, causal=False) or packed.errors_of(
            backend, causal=True, spans=spans
        )
    return wrong


class _Inputs:
    """Query, key, value and the output's gradient, like those of ``problem`` but small."""

    def __init__(self, problem: AttentionProblem, *, batch: int, queries: int, keys: int) -> None:
        shared = problem.heads // problem.groups
        self.softcap = _SOFTCAP if problem.softcap else 0.0
        groups = min(2, problem.groups)
        generator = torch.Generator().manual_seed(keys)
        # Laid out as [s, b, heads, d], as Megatron's are.
        self.query, self.key, self.value, self.grad = (
            torch.randn(length, batch, count, problem.head_size, generator=generator)
            .to(problem.device, problem.dtype)
            .permute(1, 2, 0, 3)
            for length, count in (
                (queries, groups * shared),
                (keys, groups),
                (keys, groups),
                (queries, groups * shared),
            )
        )

    def errors_of(self, backend: AttentionBackend, *, causal: bool, spans: Spans | None = None) -> str:
        """Which of the backend's results differs from the expected one."""
        inputs = self.query, self.key, self.value
        with torch.no_grad():
            result = backend.forward(*inputs, _SCALE, causal=causal, spans=spans)
            found = (
                *result[:2],
                *backend.backward(self.grad, *inputs, result, _SCALE, causal=causal, spans=spans),
            )
        names = (
            "outputs",
            "log-sum-exps",
            "gradients of queries",
            "gradients of keys",
            "gradients of values",
        )
        for name, tensor, expected in zip(names, found, self._expected(causal, spans), strict=True):
            error = (tensor.float() - expected).norm() / expected.norm()
            # Written so that NaN is wrong, too.
            if tensor.shape != expected.shape or not float(error) < _TOLERANCE:
                return name
        return ""

    def _expected(self, causal: bool, spans: Spans | None) -> Iterator[Tensor]:
        query, key, value = (
            tensor.detach().float().requires_grad_() for tensor in (self.query, self.key, self.value)
        )
        with torch.enable_grad():
            result = _explicit(query, key, value, causal, spans, self.softcap)
            grads = torch.autograd.grad(result.output, (query, key, value), self.grad.float())
        yield from (result.output.detach(), result.log_sum_exp.detach(), *grads)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, spans: Spans | None, softcap: float
) -> ForwardResult:
    """Softmax over all scores in float32."""
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * _SCALE
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        sequence = torch.zeros(query.shape[2], dtype=torch.long)
        for number, (first, last) in enumerate(spans.bounds if spans else ()):
            sequence[first:last] = number
        same = sequence[:, None] == sequence
        scores = scores.masked_fill(~same.tril().to(scores.device), -math.inf)
    return ForwardResult(scores.softmax(dim=-1) @ value, scores.logsumexp(dim=-1))
