"""Sliding windows over any backend, in blocks as long as the window: the work grows with s, not with s x s.

A query in block i of W tokens sees the keys of its own block up to its own, and of block i-1 those that come
after its own place. The first part is causal attention within blocks. The second is, too, once both blocks
are read backwards: then the later keys are the earlier ones. Both parts merge by their log-sum-exps.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from helixpipe.layers.attention.interface import AttentionBackend, ForwardResult, Gradients


def window_of(config: TransformerConfig, layer_number: int) -> int:
    """How many tokens a layer's attention sees, its own included; 0 for all before it.

    Args:
        config: with Megatron's ``window_size`` and ``window_attn_skip_freq``.
        layer_number: in the whole model, from 1.

    Raises:
        ValueError: a window over later tokens.
    """
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return 0
    before, after = config.window_size
    if after != 0:
        raise ValueError(f"--window-size {before},{after} reaches {after} tokens ahead; use {before},0")
    return int(before) + 1 if before >= 0 else 0


class WindowAttention(AttentionBackend):
    """Causal attention in which a token sees ``window`` tokens, its own included.

    Args:
        inner: computes the parts.
        window: W, at least 1.
    """

    name = "window"
    needs = "another backend"

    def __init__(self, inner: AttentionBackend, window: int) -> None:
        assert window > 0
        self._inner = inner
        self._window = window

    def forward_whole(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        assert causal, "parts of a sequence are not attended to through windows"
        length, batch = query.shape[2], query.shape[0]
        if length <= self._window:
            return self._inner.forward_whole(query, key, value, scale, True)
        query, key, value = (self._blocks(tensor) for tensor in (query, key, value))
        output, log_sum_exp, own_extra = self._inner.forward_whole(query, key, value, scale, True)
        before_extra: tuple[object, ...] = ()
        if self._window > 1:
            query, key, value = self._backwards(batch, query, key, value)
            before = self._inner.forward_whole(query, key, value, scale, True)
            before_extra = before.extra
            _merge(
                self._later(batch, output), self._later(batch, log_sum_exp),
                before.output.flip(2), before.log_sum_exp.flip(2),
            )  # fmt: skip
        log_sum_exp = self._joined(log_sum_exp[..., None], batch, length)[..., 0]
        return ForwardResult(self._joined(output, batch, length), log_sum_exp, (own_extra, before_extra))

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
        length, batch = query.shape[2], query.shape[0]
        if length <= self._window:
            return self._inner.backward_whole(grad, query, key, value, result, scale, True)
        own_extra, before_extra = result.extra
        grad, output = self._blocks(grad), self._blocks(result.output)
        log_sum_exp = self._blocks(result.log_sum_exp[..., None])[..., 0]
        query, key, value = (self._blocks(tensor) for tensor in (query, key, value))
        own = ForwardResult(output, log_sum_exp, own_extra)
        of_query, of_key, of_value = self._inner.backward_whole(grad, query, key, value, own, scale, True)
        if self._window > 1:
            grad, output, log_sum_exp = (
                self._later(batch, tensor).flip(2) for tensor in (grad, output, log_sum_exp)
            )
            before = ForwardResult(output, log_sum_exp, before_extra)
            query, key, value = self._backwards(batch, query, key, value)
            parts = self._inner.backward_whole(grad, query, key, value, before, scale, True)
            self._later(batch, of_query).add_(parts[0].flip(2))
            for total, part in ((of_key, parts[1]), (of_value, parts[2])):
                self._earlier(batch, total).add_(part.flip(2))
        joined = (self._joined(tensor, batch, length) for tensor in (of_query, of_key, of_value))
        grad_query, grad_key, grad_value = joined
        return grad_query, grad_key, grad_value

    def _blocks(self, tensor: Tensor) -> Tensor:
        """[b, heads, s, d] as [n * b, heads, W, d], with zeros after the end, which no query before sees."""
        rows = tensor.permute(2, 0, 1, 3)
        missing = -rows.shape[0] % self._window
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 0, 0, missing))
        blocks: Tensor = rows.unflatten(0, (-1, self._window))
        return blocks.permute(0, 2, 3, 1, 4).flatten(0, 1)

    def _joined(self, blocks: Tensor, batch: int, length: int) -> Tensor:
        """The reverse of :meth:`_blocks`; in memory [s, b, heads, d], as Megatron's are."""
        by_sequence: Tensor = blocks.unflatten(0, (-1, batch))
        return by_sequence.permute(0, 3, 1, 2, 4).flatten(0, 1)[:length].permute(1, 2, 0, 3)

    def _later(self, batch: int, blocks: Tensor) -> Tensor:
        """The queries that see keys of the block before: all but the last of all blocks but the first."""
        return blocks[batch:, :, : self._window - 1]

    def _earlier(self, batch: int, blocks: Tensor) -> Tensor:
        """The keys that queries of the next block see: all but the first of all blocks but the last."""
        return blocks[:-batch, :, 1:]

    def _backwards(
        self, batch: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self._later(batch, query).flip(2),
            self._earlier(batch, key).flip(2),
            self._earlier(batch, value).flip(2),
        )


def _merge(output: Tensor, log_sum_exp: Tensor, other: Tensor, other_sums: Tensor) -> None:
    """Replace results over some keys by those over them and others."""
    total = torch.logaddexp(log_sum_exp, other_sums)
    shares = ((log_sum_exp - total).exp()[..., None], (other_sums - total).exp()[..., None])
    output.copy_(output * shares[0] + other * shares[1])
    log_sum_exp.copy_(total)
