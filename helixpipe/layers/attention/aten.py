"""Attention kernels that every build of PyTorch brings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from helixpipe.layers.attention.interface import (
    AttentionBackend,
    ForwardResult,
    Gradients,
    Spans,
    packed,
    unpacked,
)

aten = torch.ops.aten


class AtenCpu(AttentionBackend):
    """PyTorch's blocked attention for CPUs."""

    name = "aten-cpu"
    needs = "a CPU"
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    head_multiple = 1
    largest_head = 1 << 16
    on_cpu, on_gpu = True, False
    # Seen to take grouped heads on 2.13; on 2.6 the kernel reads past the end of key and value.
    TAKES_GROUPS = torch.__version__ >= TorchVersion("2.13")

    def forward_whole(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        groups = self._groups_to_repeat(query, key)
        return ForwardResult(
            *aten._scaled_dot_product_flash_attention_for_cpu(
                query, _repeat(key, groups), _repeat(value, groups), 0.0, causal, scale=scale
            )
        )

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
        groups = self._groups_to_repeat(query, key)
        grad_query, grad_key, grad_value = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, _repeat(key, groups), _repeat(value, groups),
            result.output, result.log_sum_exp.contiguous(), 0.0, causal, scale=scale,
        )  # fmt: skip
        return grad_query, _sum_groups(grad_key, groups), _sum_groups(grad_value, groups)

    def _groups_to_repeat(self, query: Tensor, key: Tensor) -> int:
        return 1 if self.TAKES_GROUPS else query.shape[1] // key.shape[1]


class AtenFlash(AttentionBackend):
    """PyTorch's built-in FlashAttention-2 for CUDA."""

    name = "aten-flash"
    needs = "a GPU of compute capability 8.0 or newer"
    packs = True

    def forward_whole(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        output, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return ForwardResult(output, lse, (cum_q, cum_k, max_q, max_k, seed, offset))

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
        cum_q, cum_k, max_q, max_k, seed, offset = result.extra
        found: Gradients = aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, result.output, result.log_sum_exp.contiguous(),
            cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset, scale=scale,
        )  # fmt: skip
        return found

    def forward_packed(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Spans
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        offsets, longest = spans.offsets(query.device), spans.longest
        output, lse, seed, offset, _ = aten._flash_attention_forward(
            *map(packed, (query, key, value)),
            offsets, offsets, longest, longest, 0.0, True, False, scale=scale,
        )  # fmt: skip
        return ForwardResult(unpacked(output), lse[None], (seed, offset))

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
        offsets, longest = spans.offsets(query.device), spans.longest
        grads = aten._flash_attention_backward(
            *map(packed, (grad, query, key, value, result.output)), result.log_sum_exp[0].contiguous(),
            offsets, offsets, longest, longest, 0.0, True, *result.extra, scale=scale,
        )  # fmt: skip
        grad_query, grad_key, grad_value = map(unpacked, grads)
        return grad_query, grad_key, grad_value


class AtenEfficient(AttentionBackend):
    """PyTorch's memory-efficient attention for CUDA: float32, and head sizes that flash does not take."""

    name = "aten-efficient"
    needs = "a GPU"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    head_multiple = 1
    largest_head = 1 << 16

    def forward_whole(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        groups = query.shape[1] // key.shape[1]
        output, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            query, _repeat(key, groups), _repeat(value, groups), None, True, 0.0, causal, scale=scale
        )
        return ForwardResult(output, lse[..., : query.shape[2]], (seed, offset))

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
        groups = query.shape[1] // key.shape[1]
        # The kernel wants as many as its forward gives: a multiple of 32 queries.
        padding = -query.shape[2] % 32
        log_sum_exp = torch.nn.functional.pad(result.log_sum_exp, (0, padding)).contiguous()
        grad_query, grad_key, grad_value, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, query, _repeat(key, groups), _repeat(value, groups), None,
            result.output, log_sum_exp, *result.extra, 0.0, [True, True, True, False], causal,
            scale=scale,
        )  # fmt: skip
        return grad_query, _sum_groups(grad_key, groups), _sum_groups(grad_value, groups)


def _repeat(tensor: Tensor, groups: int) -> Tensor:
    """Repeat each key/value head for the query heads that share it."""
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _sum_groups(tensor: Tensor, groups: int) -> Tensor:
    return tensor if groups == 1 else tensor.unflatten(1, (-1, groups)).sum(dim=2)
