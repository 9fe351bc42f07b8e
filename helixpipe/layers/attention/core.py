"""Megatron's core attention by one of the backends, without the s x s score matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from helixpipe.layers.attention.choice import AUTO, choose, problem_of, problem_with
from helixpipe.layers.attention.interface import AttentionBackend, ForwardResult


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, backend: AttentionBackend
    ) -> Tensor:
        ctx.backend, ctx.scale = backend, scale
        result = backend.forward(query, key, value, scale)
        ctx.extra = result.extra
        ctx.save_for_backward(query, key, value, result.output, result.log_sum_exp)
        return result.output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        result = ForwardResult(output, log_sum_exp, ctx.extra)
        return (*ctx.backend.backward(grad, query, key, value, result, ctx.scale), None, None)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    backend: AttentionBackend | None = None,
) -> Tensor:
    """Causal attention over a whole sequence.

    Args:
        query: [s, b, heads, d].
        key: [s, b, groups, d]; groups divides heads.
        value: like ``key``.
        scale: factor of the scores, ``1/sqrt(d)`` if None.
        backend: what computes it; None: the fastest that works.

    Returns:
        [s, b, heads * d].
    """
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    if backend is None:
        backend = choose(AUTO, problem_with(query, key)).backend
    return _Attention.apply(query, key, value, scale, backend).permute(2, 0, 1, 3).flatten(2)


class FlashCoreAttention(MegatronModule):
    """Megatron's core-attention slot, filled with :func:`causal_attention`.

    The backend is chosen here and not at the first use: it is tried, and a pipeline that already runs must
    not wait for that.

    Args:
        backend: name of the attention backend, or ``auto``.

    Raises:
        ValueError: attention dropout, sliding windows or softmax variants, which these kernels do not have,
            or a backend that does not work.
    """

    # Lengths of sequences are those of the configuration.
    _varies = False

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        attention_dropout: float | None = None,
        backend: str = AUTO,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(
                f"--attention-backend {backend} has no dropout ({dropout}); use unfused, or "
                "--attention-dropout 0"
            )
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ValueError("only causal self-attention is supported")
        if config.softmax_type != "vanilla":
            raise ValueError(f"the softmax variant {config.softmax_type!r} is not supported")
        if config.window_size is not None:
            raise ValueError("sliding-window attention is not supported")
        if config.apply_query_key_layer_scaling:
            raise ValueError("query-key layer scaling is not supported; it only serves fp16 softmax")
        self.scale = softmax_scale
        self.backend = choose(backend, problem_of(config, varies=self._varies)).backend

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
        return causal_attention(query, key, value, self.scale, self.backend)
