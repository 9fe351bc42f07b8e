"""cuDNN's attention, through PyTorch and through Transformer Engine.

cuDNN builds a plan for every new pair of lengths, which takes far longer than a launch: it is for whole
sequences of one length.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from helixpipe.layers.attention.aten import AtenFlash
from helixpipe.layers.attention.interface import AttentionBackend, ForwardResult, Gradients

aten = torch.ops.aten


class _Cudnn(AttentionBackend):
    """What both ways share: cuDNN takes no sequence of one key, PyTorch's flash attention does."""

    is_deterministic = False

    def __init__(self) -> None:
        self._for_one_key = AtenFlash()

    def forward_whole(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        if key.shape[2] == 1:
            return self._for_one_key.forward_whole(query, key, value, scale, causal)
        return self.forward_long(query, key, value, scale, causal)

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
        if key.shape[2] == 1:
            return self._for_one_key.backward_whole(grad, query, key, value, result, scale, causal)
        return self.backward_long(grad, query, key, value, result, scale, causal)

    @abstractmethod
    def forward_long(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> ForwardResult:
        """Of two keys or more."""

    @abstractmethod
    def backward_long(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: ForwardResult,
        scale: float,
        causal: bool,
    ) -> Gradients:
        """Of two keys or more."""


class AtenCudnn(_Cudnn):
    """cuDNN through PyTorch, in any strides but for a dense d."""

    name = "cudnn"
    needs = "PyTorch with cuDNN 9"

    def forward_long(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        output, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
        extra = (seed, offset, None, cum_q, cum_k, max_q, max_k)
        # [b, heads, s, 1]; before torch 2.6 without the last.
        return ForwardResult(output, lse.reshape(output.shape[:3]), extra)

    def backward_long(
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
        found: Gradients = aten._scaled_dot_product_cudnn_attention_backward(
            grad, query, key, value, result.output, result.log_sum_exp.contiguous()[..., None],
            *result.extra, 0.0, causal, scale=scale,
        )  # fmt: skip
        return found


class EngineCudnn(_Cudnn):
    """cuDNN through Transformer Engine, which takes dense [s, b, heads, d] only: other layouts are copied."""

    name = "te-cudnn"
    needs = "Transformer Engine 2"
    # Its own cuDNN kernels can be told to be deterministic.
    is_deterministic = True

    def __init__(self) -> None:
        super().__init__()
        self._library: Any = importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
        self._types: Any = importlib.import_module("transformer_engine.pytorch.constants").TE_DType

    def forward_long(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        output, (statistics, *extra) = self._library.fused_attn_fwd(
            True, *_sizes(query, key), *_as_sbhd(query, key, value), query.dtype, self._kernel(),
            **_engine_options(scale, causal),
        )  # fmt: skip
        return ForwardResult(output.permute(1, 2, 0, 3), statistics.squeeze(-1), tuple(extra))

    def backward_long(
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
        statistics = result.log_sum_exp.contiguous()[..., None]
        grads = self._library.fused_attn_bwd(
            *_sizes(query, key), *_as_sbhd(query, key, value, result.output, grad), query.dtype,
            self._types[query.dtype], [statistics, *result.extra], self._kernel(),
            **_engine_options(scale, causal), deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        grad_query, grad_key, grad_value = (tensor.permute(1, 2, 0, 3) for tensor in grads[:3])
        return grad_query, grad_key, grad_value

    def _kernel(self) -> Any:
        return self._library.FusedAttnBackend["F16_arbitrary_seqlen"]


def _as_sbhd(*tensors: Tensor) -> list[Tensor]:
    return [tensor.permute(2, 0, 1, 3).contiguous() for tensor in tensors]


def _sizes(query: Tensor, key: Tensor) -> tuple[int, int, Tensor, Tensor]:
    """Lengths of queries and keys, and where each sequence of the batch begins."""
    lengths = (query.shape[2], key.shape[2])
    starts = (
        torch.arange(query.shape[0] + 1, dtype=torch.int32, device=query.device) * length
        for length in lengths
    )
    return (*lengths, next(starts), next(starts))


def _engine_options(scale: float, causal: bool) -> dict[str, Any]:
    return {
        "attn_scale": scale,
        "dropout": 0.0,
        "qkv_layout": "sbhd_sbhd_sbhd",
        "attn_bias_type": "no_bias",
        "attn_mask_type": "causal" if causal else "no_mask",
        "window_size": (-1, 0 if causal else -1),
    }
