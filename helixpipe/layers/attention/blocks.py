"""Attention by blocks of queries and keys in plain PyTorch, for what kernels lack: caps of scores.

The scores of one block exist at a time, forward and backward, and are computed again in the backward pass by
the log-sum-exp, as in FlashAttention (arXiv 2205.14135). 16-bit inputs are computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from helixpipe.layers.attention.interface import AttentionBackend, ForwardResult, Gradients

# Scores of all heads that exist at a time, and the sides of a block, in tokens.
_SCORES = 1 << 23
_SHORTEST, _LONGEST = 64, 512


class BlockAttention(AttentionBackend):
    """Scores in blocks, each small beside the inputs of a long sequence."""

    name = "blocks"
    needs = "nothing; chosen where no kernel can do what is asked for"
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    head_multiple = 1
    largest_head = 1 << 16
    on_cpu = True
    caps = True

    def forward_whole(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        wide = _wide_type(query)
        output, log_sum_exp = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=wide)
        grouped, of_groups = _by_group(output, key), _by_group(log_sum_exp, key)
        side = _side(query)
        for rows in _parts(query.shape[2], side):
            queries = _by_group(query, key)[:, :, :, rows].to(wide) * scale
            total = torch.zeros_like(queries)
            largest = queries.new_full(queries.shape[:-1], -math.inf)
            weight = torch.zeros_like(largest)
            for columns in _parts(_end(rows, key, causal), side):
                scores, _ = self._scores(queries, key, rows, columns, causal)
                before, largest = largest, torch.maximum(largest, scores.amax(dim=-1))
                scores = scores.sub_(largest[..., None]).exp_()
                share = (before - largest).exp()
                weight = weight * share + scores.sum(dim=-1)
                total = total * share[..., None] + _times(scores, value[:, :, columns].to(wide))
            grouped[:, :, :, rows] = (total / weight[..., None]).to(query.dtype)
            of_groups[:, :, :, rows] = largest + weight.log()
        return ForwardResult(output, log_sum_exp)

    def backward_whole(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: ForwardResult,
        scale: float,
        causal: bool,
    ) -> Gradients:
        """See :class:`AttentionBackend`."""
        wide = _wide_type(query)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(tensor, dtype=wide) for tensor in (key, value))
        grouped, side = _by_group(grad_query, key), _side(query)
        for rows in _parts(query.shape[2], side):
            queries, grads, outputs, sums = (
                _by_group(tensor, key)[:, :, :, rows].to(wide)
                for tensor in (query, grad, result.output, result.log_sum_exp)
            )
            queries = queries * scale
            of_outputs = (grads * outputs).sum(dim=-1, keepdim=True)
            total = torch.zeros_like(queries)
            for columns in _parts(_end(rows, key, causal), side):
                scores, slope = self._scores(queries, key, rows, columns, causal)
                scores = scores.sub_(sums[..., None]).exp_()
                grad_value[:, :, columns] += _transposed_times(scores, grads)
                of_scores = _times(grads, value[:, :, columns].to(wide).transpose(2, 3))
                of_scores = of_scores.sub_(of_outputs).mul_(scores)
                if slope is not None:
                    of_scores.mul_(slope)
                total += _times(of_scores, key[:, :, columns].to(wide))
                grad_key[:, :, columns] += _transposed_times(of_scores, queries)
            grouped[:, :, :, rows] = (total * scale).to(query.dtype)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)

    def _scores(
        self, queries: Tensor, key: Tensor, rows: slice, columns: slice, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of a block, [b, groups, shared, n, m], and the slope of the cap at each."""
        scores = _times(queries, key[:, :, columns].to(queries.dtype).transpose(2, 3))
        slope = None
        if self.softcap:
            bent = scores.div_(self.softcap).tanh_()
            slope = 1.0 - bent.square()
            scores = bent.mul_(self.softcap)
        if causal and columns.stop > rows.start + 1:
            places = torch.arange(rows.start, rows.stop, device=key.device)
            later = torch.arange(columns.start, columns.stop, device=key.device) > places[:, None]
            scores.masked_fill_(later, -math.inf)
        return scores, slope


def _wide_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _by_group(tensor: Tensor, key: Tensor) -> Tensor:
    """[b, heads, …] as [b, groups, heads that share one, …], a view."""
    view: Tensor = tensor.unflatten(1, (key.shape[1], -1))
    return view


def _side(query: Tensor) -> int:
    """Tokens of a block; more queries and keys at a time where there are few heads."""
    fits = math.isqrt(_SCORES // (query.shape[0] * query.shape[1]))
    return min(_LONGEST, max(_SHORTEST, fits))


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _end(rows: slice, key: Tensor, causal: bool) -> int:
    """Keys that any of these queries sees."""
    stop: int = rows.stop
    return stop if causal else key.shape[2]


def _times(left: Tensor, right: Tensor) -> Tensor:
    """[b, groups, shared, n, i] by [b, groups, i, m]."""
    product: Tensor = (left.flatten(2, 3) @ right).unflatten(2, left.shape[2:4])
    return product


def _transposed_times(left: Tensor, right: Tensor) -> Tensor:
    """[b, groups, shared, n, m] and [b, groups, shared, n, d] -> [b, groups, m, d], their sum."""
    return left.flatten(2, 3).transpose(2, 3) @ right.flatten(2, 3)
