"""Core attention without the s x s score matrix, on CPU and GPU.

Each backend returns the output and the log-sum-exp of the scores, and has a backward pass that takes both, so
attention never has to run twice (HelixPipe, section "recomputation without attention").
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.torch_version import TorchVersion

aten = torch.ops.aten


class ForwardResult(NamedTuple):
    """Output [b, heads, s, d], log-sum-exp [b, heads, s], and what the backend's backward also needs."""

    output: Tensor
    log_sum_exp: Tensor
    extra: tuple[Any, ...] = ()


class AttentionBackend(Protocol):
    """Attention of query [b, heads, s, d] over key and value [b, groups, t, d].

    With ``causal``, s = t and a query sees the keys up to its own; without, all of them.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = True
    ) -> ForwardResult:
        """Compute the output and the log-sum-exp."""

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: ForwardResult,
        scale: float,
        *,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value.

        Output and log-sum-exp in ``result`` may be those over more keys: then these are the gradients
        through this part of them.
        """


class AtenCpu:
    """PyTorch's blocked attention for CPUs; float64, float32 and bfloat16."""

    # Seen to take grouped heads on 2.13; on 2.6 the kernel reads past the end of key and value.
    TAKES_GROUPS = torch.__version__ >= TorchVersion("2.13")

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = True
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        groups = self._groups_to_repeat(query, key)
        return ForwardResult(
            *aten._scaled_dot_product_flash_attention_for_cpu(
                query, _repeat(key, groups), _repeat(value, groups), 0.0, causal, scale=scale
            )
        )

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: ForwardResult,
        scale: float,
        *,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`AttentionBackend`."""
        groups = self._groups_to_repeat(query, key)
        grad_query, grad_key, grad_value = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, _repeat(key, groups), _repeat(value, groups),
            result.output, result.log_sum_exp, 0.0, causal, scale=scale,
        )  # fmt: skip
        return grad_query, _sum_groups(grad_key, groups), _sum_groups(grad_value, groups)

    def _groups_to_repeat(self, query: Tensor, key: Tensor) -> int:
        return 1 if self.TAKES_GROUPS else query.shape[1] // key.shape[1]


class AtenFlash:
    """PyTorch's built-in FlashAttention-2 for CUDA: float16 and bfloat16."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = True
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        output, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return ForwardResult(output, lse, (cum_q, cum_k, max_q, max_k, seed, offset))

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: ForwardResult,
        scale: float,
        *,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`AttentionBackend`."""
        cum_q, cum_k, max_q, max_k, seed, offset = result.extra
        return aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, result.output, result.log_sum_exp,
            cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset, scale=scale,
        )  # fmt: skip


class AtenEfficient:
    """PyTorch's memory-efficient attention for CUDA: float32, and head sizes that flash does not take."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = True
    ) -> ForwardResult:
        """See :class:`AttentionBackend`."""
        groups = query.shape[1] // key.shape[1]
        output, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            query, _repeat(key, groups), _repeat(value, groups), None, True, 0.0, causal, scale=scale
        )
        return ForwardResult(output, lse, (seed, offset))

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: ForwardResult,
        scale: float,
        *,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`AttentionBackend`."""
        groups = query.shape[1] // key.shape[1]
        log_sum_exp = result.log_sum_exp
        # The kernel wants as many as its forward gives: a multiple of 32 queries.
        log_sum_exp = torch.nn.functional.pad(log_sum_exp, (0, -log_sum_exp.shape[-1] % 32))
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


def choose_backend(query: Tensor) -> AttentionBackend:
    """The aten backend for a tensor's device, type and head size."""
    if not query.is_cuda:
        return AtenCpu()
    if query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0:
        return AtenFlash()
    return AtenEfficient()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.backend = choose_backend(query)
        ctx.scale = scale
        result = ctx.backend.forward(query, key, value, scale)
        ctx.extra = result.extra
        ctx.save_for_backward(query, key, value, result.output, result.log_sum_exp)
        return result.output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        result = ForwardResult(output, log_sum_exp, ctx.extra)
        return (*ctx.backend.backward(grad, query, key, value, result, ctx.scale), None)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention over a whole sequence.

    Args:
        query: [s, b, heads, d].
        key: [s, b, groups, d]; groups divides heads.
        value: like ``key``.
        scale: factor of the scores, ``1/sqrt(d)`` if None.

    Returns:
        [s, b, heads * d].
    """
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if query.is_cuda and _has_flash_attn() and query.dtype in (torch.float16, torch.bfloat16):
        from flash_attn import flash_attn_func

        output = flash_attn_func(
            *(tensor.transpose(0, 1) for tensor in (query, key, value)), softmax_scale=scale, causal=True
        ).transpose(0, 1)
    else:
        batch_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = _Attention.apply(*batch_first, scale).permute(2, 0, 1, 3)
    return output.flatten(2)


def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


class FlashCoreAttention(MegatronModule):
    """Megatron's core-attention slot, filled with :func:`causal_attention`.

    Raises:
        ValueError: attention dropout, sliding windows or softmax variants, which these kernels do not have.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        attention_dropout: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention dropout ({dropout}) is not supported; use --attention-dropout 0")
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ValueError("only causal self-attention is supported")
        if config.softmax_type != "vanilla":
            raise ValueError(f"the softmax variant {config.softmax_type!r} is not supported")
        if config.window_size is not None:
            raise ValueError("sliding-window attention is not supported")
        if config.apply_query_key_layer_scaling:
            raise ValueError("query-key layer scaling is not supported; it only serves fp16 softmax")
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[s, b, heads, d], [s, b, groups, d] twice -> [s, b, heads * d].

        The mask argument exists for Megatron's calling convention: the mask is causal by construction.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("attention bias and packed sequences are not supported")
        return causal_attention(query, key, value, self.scale)
