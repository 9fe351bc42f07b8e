"""FlashAttention-2 and -3 as their own packages bring them.

Both take [b, s, heads, d], or [T, heads, d] with the offsets of packed sequences, in any strides but for a
dense d, and grouped heads as they are. Their functions with log-sum-exp and explicit gradients begin with an
underscore, but are what Megatron and Transformer Engine call, too.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from helixpipe.layers.attention.interface import (
    AttentionBackend,
    ForwardResult,
    Gradients,
    Spans,
    packed,
    unpacked,
)


class FlashAttention2(AttentionBackend):
    """The package ``flash_attn``."""

    name = "flash-attn-2"
    needs = "the package flash-attn 2.7 or newer"
    packs = True
    caps = True

    def __init__(self) -> None:
        self._library: Any = importlib.import_module("flash_attn.flash_attn_interface")

    def forward_whole(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        output, lse, _, random_state = self._library._flash_attn_forward(
            *_sequence_first(query, key, value), **self._options(scale, causal), return_softmax=False
        )
        return ForwardResult(output.transpose(1, 2), lse, (random_state,))

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
        grad, query, key, value, output = _sequence_first(grad, query, key, value, result.output)
        grads = tuple(map(torch.empty_like, (query, key, value)))
        self._library._flash_attn_backward(
            grad, query, key, value, output, result.log_sum_exp.contiguous(), *grads,
            **self._options(scale, causal), deterministic=_deterministic(), rng_state=result.extra[0],
        )  # fmt: skip
        grad_query, grad_key, grad_value = (tensor.transpose(1, 2) for tensor in grads)
        return grad_query, grad_key, grad_value

    def forward_packed(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Spans
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        output, lse, _, random_state = self._library._flash_attn_varlen_forward(
            *map(packed, (query, key, value)), *_lengths(spans, query.device), **self._options(scale, True),
            return_softmax=False,
        )  # fmt: skip
        return ForwardResult(unpacked(output), lse[None], (random_state,))

    def backward_packed(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: ForwardResult,
        scale: float,
        spans: Spans,
    ) -> Gradients:
        """See :class:`AttentionBackend`."""
        grad, query, key, value, output = map(packed, (grad, query, key, value, result.output))
        grads = tuple(map(torch.empty_like, (query, key, value)))
        self._library._flash_attn_varlen_backward(
            grad, query, key, value, output, result.log_sum_exp[0].contiguous(), *grads,
            *_lengths(spans, query.device), **self._options(scale, True), deterministic=_deterministic(),
            rng_state=result.extra[0],
        )  # fmt: skip
        grad_query, grad_key, grad_value = map(unpacked, grads)
        return grad_query, grad_key, grad_value

    def _options(self, scale: float, causal: bool) -> dict[str, Any]:
        return {
            "dropout_p": 0.0,
            "softmax_scale": scale,
            "causal": causal,
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": self.softcap,
            "alibi_slopes": None,
        }


class FlashAttention3(AttentionBackend):
    """FlashAttention-3, whose kernels are made for Hopper."""

    name = "flash-attn-3"
    needs = "FlashAttention-3 (flash_attn_interface), an H100, H200 or H20"
    packs = True
    caps = True

    # Where its builds and wheels have put the interface.
    _MODULES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")

    def __init__(self) -> None:
        self._library: Any = _import_first(self._MODULES)

    def forward_whole(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        output, lse = self._forward(_sequence_first(query, key, value), None, scale, causal)
        return ForwardResult(output.transpose(1, 2), lse)

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
        tensors = _sequence_first(grad, query, key, value, result.output)
        grads = self._backward(tensors, result.log_sum_exp, None, scale, causal)
        grad_query, grad_key, grad_value = (tensor.transpose(1, 2) for tensor in grads)
        return grad_query, grad_key, grad_value

    def forward_packed(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Spans
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        output, lse = self._forward([packed(t) for t in (query, key, value)], spans, scale, True)
        return ForwardResult(unpacked(output), lse[None])

    def backward_packed(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: ForwardResult,
        scale: float,
        spans: Spans,
    ) -> Gradients:
        """See :class:`AttentionBackend`."""
        tensors = [packed(tensor) for tensor in (grad, query, key, value, result.output)]
        grads = self._backward(tensors, result.log_sum_exp[0], spans, scale, True)
        grad_query, grad_key, grad_value = map(unpacked, grads)
        return grad_query, grad_key, grad_value

    def _forward(
        self, tensors: list[Tensor], spans: Spans | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        offsets = longest = None
        if spans is not None:
            offsets, longest = spans.offsets(tensors[0].device), spans.longest
        # By position: names and defaults differ between releases, this order does not.
        output, lse, *_ = self._library._flash_attn_forward(
            *tensors,
            *[None] * 4,  # new keys and values, queries times values, a place for the output
            offsets, offsets, None, None, None, longest, longest,
            *[None] * 9,  # pages, padding, rotary positions, fp8's scales
            scale, causal, softcap=self.softcap,
        )  # fmt: skip
        return output, lse

    def _backward(
        self, tensors: list[Tensor], lse: Tensor, spans: Spans | None, scale: float, causal: bool
    ) -> tuple[Tensor, ...]:
        offsets = longest = None
        if spans is not None:
            offsets, longest = spans.offsets(tensors[0].device), spans.longest
        grads = tuple(torch.empty_like(tensor) for tensor in tensors[1:4])
        self._library._flash_attn_backward(
            *tensors, lse.contiguous(), offsets, offsets, None, None, longest, longest, *grads, scale, causal,
            softcap=self.softcap, deterministic=_deterministic(),
        )  # fmt: skip
        return grads


def _import_first(names: tuple[str, ...]) -> ModuleType:
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise  # it is there, and something that it needs is not
    return importlib.import_module(names[-1])


def _sequence_first(*tensors: Tensor) -> list[Tensor]:
    """[b, heads, s, d] each as [b, s, heads, d], views."""
    return [tensor.transpose(1, 2) for tensor in tensors]


def _lengths(spans: Spans, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    offsets = spans.offsets(device)
    return offsets, offsets, spans.longest, spans.longest


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()
