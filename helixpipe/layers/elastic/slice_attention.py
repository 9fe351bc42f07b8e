"""Attention of chunks: packed sequences do not see each other, a slice sees all of those before it.

Queries of a slice attend to the keys of each earlier slice without a mask and to their own causally; partial
results merge by log-sum-exp, as in InfiniPipe (arXiv 2509.21275) and in ring attention (arXiv 2310.01889).
The backward pass of every part takes the merged output and log-sum-exp, which makes its probabilities those
over all keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from helixpipe.kernels import merge_attention
from helixpipe.layers.attention import AttentionBackend, ForwardResult, choose_backend
from helixpipe.layers.elastic.context import ContextStore, KeptSlice, alone
from helixpipe.layers.elastic.layout import ChunkLayout


class _Forward:
    """One chunk's attention in one layer; tensors are [1, heads or groups, tokens, d]."""

    def __init__(self, backend: AttentionBackend, scale: float) -> None:
        self.backend = backend
        self.scale = scale
        # What kernels need back: by span for the chunk's own keys, by earlier slice for the context.
        self.own_extra: list[tuple[Any, ...]] = []
        self.context_extra: list[tuple[Any, ...]] = []

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, layout: ChunkLayout, context: list[KeptSlice]
    ) -> tuple[Tensor, Tensor]:
        """Output [1, heads, T, d] and log-sum-exp [1, heads, T]."""
        outputs, sums = [], []
        for first, last in layout.spans:
            q, k, v = (tensor[:, :, first:last] for tensor in (query, key, value))
            own = self.backend.forward(q, k, v, self.scale)
            self.own_extra.append(own.extra)
            outputs.append(own.output)
            sums.append(own.log_sum_exp[..., : last - first])
        if context:
            first, last = layout.spans[0]
            outputs[0], sums[0] = self._merge_context(query[:, :, first:last], outputs[0], sums[0], context)
        return _join(outputs), torch.cat(sums, dim=2)

    def _merge_context(
        self, query: Tensor, output: Tensor, log_sum_exp: Tensor, context: list[KeptSlice]
    ) -> tuple[Tensor, Tensor]:
        # Sums of 16-bit parts are kept in the log-sum-exp's type, so that each is rounded once.
        total = output.to(log_sum_exp.dtype)
        for kept in context:
            part = self.backend.forward(query, kept.key, kept.value, self.scale, causal=False)
            self.context_extra.append(part.extra)
            merge_attention(total, log_sum_exp, part.output, part.log_sum_exp[..., : query.shape[2]])
        return total.to(output.dtype), log_sum_exp


def _own_gradients(
    ran: _Forward, layout: ChunkLayout, grad: Tensor, saved: tuple[Tensor, ...]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Gradients of query, key and value of every span, through the chunk's own keys."""
    query, key, value, output, log_sum_exp = saved
    gradients = []
    for (first, last), extra in zip(layout.spans, ran.own_extra, strict=True):
        part = slice(first, last)
        result = ForwardResult(output[:, :, part], log_sum_exp[..., part].contiguous(), extra)
        q, k, v = (tensor[:, :, part] for tensor in (query, key, value))
        gradients.append(ran.backend.backward(grad[:, :, part], q, k, v, result, ran.scale))
    return gradients


def _context_gradients(
    ran: _Forward,
    layout: ChunkLayout,
    grad: Tensor,
    saved: tuple[Tensor, ...],
    context: list[KeptSlice],
    grad_query: Tensor,
) -> Tensor:
    """Add keys' and values' gradients to the earlier slices; the query's, with ``grad_query``, now used."""
    part = slice(*layout.spans[0])
    query, output, grad = (tensor[:, :, part] for tensor in (saved[0], saved[3], grad))
    log_sum_exp = saved[4][..., part].contiguous()
    total = grad_query.to(log_sum_exp.dtype)
    for kept, extra in zip(context, ran.context_extra, strict=True):
        result = ForwardResult(output, log_sum_exp, extra)
        grad_part, grad_key, grad_value = ran.backend.backward(
            grad, query, kept.key, kept.value, result, ran.scale, causal=False
        )
        total += grad_part
        kept.add_gradients(grad_key, grad_value)
    return total.to(grad_query.dtype)


class _SliceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        layer: int,
        layout: ChunkLayout,
        contexts: ContextStore,
        keeps_graph: bool,
    ) -> Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in _compact(query, key, value))
        piece = layout.pieces[0]
        ran = _Forward(choose_backend(query), scale)
        output, log_sum_exp = ran.run(query, key, value, layout, contexts.earlier(layer, piece))
        if piece.is_continued:
            own = slice(*layout.spans[0])
            pair = key[:, :, own], value[:, :, own]
            # Without a graph nothing else keeps the rest of what they may be views of.
            contexts.keep(layer, piece, *(pair if keeps_graph else map(alone, pair)))
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.ran, ctx.layer, ctx.layout, ctx.contexts = ran, layer, layout, contexts
        return output.permute(2, 0, 1, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ran, layer, layout, contexts = ctx.ran, ctx.layer, ctx.layout, ctx.contexts
        saved, piece = ctx.saved_tensors, layout.pieces[0]
        grad = grad.permute(1, 2, 0, 3)
        gradients = _own_gradients(ran, layout, grad, saved)
        grad_query, grad_key, grad_value = gradients[0]
        if piece.start:
            context = contexts.earlier(layer, piece)
            grad_query = _context_gradients(ran, layout, grad, saved, context, grad_query)
        if piece.is_continued:
            kept = contexts.take(layer, piece)
            assert kept.grad_key is not None, "the next slice's backward has not run"
            assert kept.grad_value is not None
            grad_key, grad_value = grad_key + kept.grad_key, grad_value + kept.grad_value
        gradients[0] = grad_query, grad_key, grad_value
        whole = (_join(parts).permute(2, 0, 1, 3) for parts in zip(*gradients, strict=True))
        return (*whole, None, None, None, None, None)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Parts [1, heads, t, d] as one [1, heads, T, d], which lies in memory as [T, 1, heads, d]."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.permute(2, 0, 1, 3) for part in parts]).permute(1, 2, 0, 3)


def _compact(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same values, without what their storages hold beside them.

    Megatron's query, key and value are views of one tensor. Once the query and key are rotated, or the query
    is copied because heads share keys, the value alone would keep all of it.
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (query, key, value)}
    used = sum(tensor.numel() * tensor.element_size() for tensor in (query, key, value))
    if sum(storages.values()) == used:
        return query, key, value
    return alone(query), alone(key), alone(value)


def slice_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ChunkLayout,
    contexts: ContextStore,
    *,
    layer: int,
    scale: float | None = None,
) -> Tensor:
    """Attention of one chunk in one layer.

    Keys and values of a slice that goes on are kept in ``contexts``. The backward pass, which must run for
    the slices of a sequence from the last to the first, adds to the gradients there.

    Args:
        query: [T, 1, heads, d].
        key: [T, 1, groups, d]; groups divides heads.
        value: like ``key``.
        layout: of the chunk.
        contexts: of the stage.
        layer: any number that tells the stage's layers apart.
        scale: factor of the scores, ``1/sqrt(d)`` if None.

    Returns:
        [T, 1, heads * d].
    """
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    keeps_graph = torch.is_grad_enabled()
    output = _SliceAttention.apply(query, key, value, scale, layer, layout, contexts, keeps_graph)
    return output.flatten(2)
