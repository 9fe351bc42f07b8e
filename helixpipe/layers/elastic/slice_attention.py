"""Attention of chunks: packed sequences do not see each other, a slice sees those before it of its sequence.

Queries of a slice attend to the keys of each earlier slice without a mask and to their own causally; partial
results merge by log-sum-exp, as in InfiniPipe (arXiv 2509.21275) and in ring attention (arXiv 2310.01889).
The backward pass of every part takes the merged output and log-sum-exp, which makes its probabilities those
over all keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helixpipe.kernels import merge_attention
from helixpipe.layers.attention.choice import AUTO, choose, problem_with
from helixpipe.layers.attention.interface import AttentionBackend, ForwardResult
from helixpipe.layers.attention.sinks import merge_sink, sink_gradient
from helixpipe.layers.attention.windows import WindowAttention
from helixpipe.layers.elastic.context import ContextStore, KeptSlice, alone
from helixpipe.layers.elastic.layout import ChunkLayout
from helixpipe.layers.elastic.window_parts import WindowPart, rows, window_parts

# What a message has behind its tensors, filled up to whole words.
_HEADER_BYTES = 64


class _Forward:
    """One chunk's attention in one layer; tensors are [1, heads or groups, tokens, d]."""

    def __init__(self, backend: AttentionBackend, scale: float, window: int) -> None:
        self.backend = backend
        self.own_backend = WindowAttention(backend, window) if window else backend
        self.scale = scale
        self.window = window
        # What kernels need back: for the chunk's own keys, and by part of an earlier slice for the context.
        self.own_extra: tuple[Any, ...] = ()
        self.context_extra: list[tuple[Any, ...]] = []

    def parts(
        self, num_queries: int, context: list[KeptSlice], layout: ChunkLayout
    ) -> Iterator[tuple[KeptSlice, WindowPart]]:
        """What the first sequence's queries see of the context, slice by slice."""
        distance = sum(kept.length for kept in context)
        for kept in context:
            # Its first tokens may be of documents that have ended.
            hidden = max(0, distance - layout.context_length)
            if hidden < kept.length:
                for part in window_parts(num_queries, kept.length - hidden, distance - hidden, self.window):
                    yield kept, part.behind(hidden)
            distance -= kept.length

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, layout: ChunkLayout, context: list[KeptSlice]
    ) -> tuple[Tensor, Tensor]:
        """Output [1, heads, T, d] and log-sum-exp [1, heads, T]."""
        own = self.own_backend.forward(query, key, value, self.scale, spans=layout.sequences)
        self.own_extra = own.extra
        if layout.context_length:
            part = slice(*layout.sequences.bounds[0])
            first = own.output[:, :, part]
            parts = self.parts(first.shape[2], context, layout)
            first.copy_(self._merged(query[:, :, part], first, own.log_sum_exp[..., part], parts))
        return own.output, own.log_sum_exp

    def _merged(
        self,
        query: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        parts: Iterable[tuple[KeptSlice, WindowPart]],
    ) -> Tensor:
        """The output over the context, too, whose log-sum-exp is added in place."""
        # Sums of 16-bit parts are kept in the log-sum-exp's type, so that each is rounded once.
        total = output.to(log_sum_exp.dtype)
        for kept, part in parts:
            found = part.forward(self.backend, query, kept.key, kept.value, self.scale)
            self.context_extra.append(found.extra)
            sums = rows(log_sum_exp, part.queries)
            merge_attention(rows(total, part.queries), sums, found.output, found.log_sum_exp)
        return total


def _own_gradients(
    ran: _Forward, layout: ChunkLayout, grad: Tensor, saved: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value through the chunk's own keys."""
    query, key, value, output, log_sum_exp = saved
    result = ForwardResult(output, log_sum_exp, ran.own_extra)
    return ran.own_backend.backward(grad, query, key, value, result, ran.scale, spans=layout.sequences)


def _add_context_gradients(
    ran: _Forward,
    layout: ChunkLayout,
    grad: Tensor,
    saved: Sequence[Tensor],
    context: list[KeptSlice],
    grad_query: Tensor,
) -> None:
    """Add keys' and values' gradients to the earlier slices, and to ``grad_query`` what comes from them."""
    first = slice(*layout.sequences.bounds[0])
    query, output, grad, of_query = (t[:, :, first] for t in (saved[0], saved[3], grad, grad_query))
    log_sum_exp = saved[4][..., first]
    total = of_query.to(log_sum_exp.dtype)
    parts = ran.parts(query.shape[2], context, layout)
    for (kept, part), extra in zip(parts, ran.context_extra, strict=True):
        result = ForwardResult(output, log_sum_exp, extra)
        of_part, grad_key, grad_value = part.backward(
            ran.backend, grad, query, kept.key, kept.value, result, ran.scale
        )
        rows(total, part.queries).add_(of_part)
        kept.add_gradients(grad_key, grad_value, part.keys)
    for kept in context:
        kept.expect_gradients()
    of_query.copy_(total)


class _SliceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        scale: float,
        layer: int,
        layout: ChunkLayout,
        contexts: ContextStore,
        backend: AttentionBackend,
        window: int,
        keeps_graph: bool,
    ) -> Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in compact(query, key, value))
        first, last = layout.pieces[0], layout.pieces[-1]
        ran = _Forward(backend, scale, window)
        output, log_sum_exp = ran.run(query, key, value, layout, contexts.earlier(layer, first))
        output, log_sum_exp = merge_sink(output, log_sum_exp, sink)
        if last.is_continued:
            own = slice(*layout.last_span)
            pair = key[:, :, own], value[:, :, own]
            # Without a graph nothing else keeps the rest of what they may be views of.
            contexts.keep(layer, last, *(pair if keeps_graph else map(alone, pair)))
        ctx.save_for_backward(query, key, value, output, log_sum_exp, sink)
        ctx.ran, ctx.layer, ctx.layout, ctx.contexts = ran, layer, layout, contexts
        return output.permute(2, 0, 1, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ran, layer, layout, contexts = ctx.ran, ctx.layer, ctx.layout, ctx.contexts
        *saved, sink = ctx.saved_tensors
        first, last = layout.pieces[0], layout.pieces[-1]
        grad = grad.permute(1, 2, 0, 3)
        grad_query, grad_key, grad_value = _own_gradients(ran, layout, grad, saved)
        if first.start:
            context = contexts.earlier(layer, first)
            _add_context_gradients(ran, layout, grad, saved, context, grad_query)
        if last.is_continued:
            kept = contexts.take(layer, last)
            own = slice(*layout.last_span)
            for grad_own, total in zip((grad_key, grad_value), kept.sums(), strict=True):
                grad_own[:, :, own] += total
        whole = (tensor.permute(2, 0, 1, 3) for tensor in (grad_query, grad_key, grad_value))
        return (*whole, sink_gradient(grad, saved[3], saved[4], sink), *(None,) * 7)


def compact(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same values, without what their storages hold beside them.

    Megatron's query, key and value are views of one tensor. Once the query and key are rotated, or the query
    is copied because heads share keys, the value alone would keep all of it.
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (query, key, value)}
    used = sum(tensor.numel() * tensor.element_size() for tensor in (query, key, value))
    if sum(storages.values()) <= used + _HEADER_BYTES:
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
    backend: AttentionBackend | None = None,
    window: int = 0,
    sink: Tensor | None = None,
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
        backend: what computes it; None: the fastest that works.
        window: how many tokens of its sequence a token sees, its own included; 0 for all before it.
        sink: scores of the heads' attention sinks, [heads]; None for no sinks.

    Returns:
        [T, 1, heads * d].
    """
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if backend is None:
        problem = problem_with(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key)))
        backend = choose(AUTO, replace(problem, varies=True)).backend
    keeps_graph = torch.is_grad_enabled()
    output: Tensor = _SliceAttention.apply(
        query, key, value, sink, scale, layer, layout, contexts, backend, window, keeps_graph
    )
    return output.flatten(2)
