"""Stand-in for Transformer Engine's fused attention by cuDNN: dense [s, b, heads, d] without packing.

Its kernels go by the layout that they are told, whatever the strides: other strides are refused here.
"""

from __future__ import annotations

from typing import Any

import exact_attention
import torch
from stand_ins import rules
from torch import Tensor

from transformer_engine.pytorch.constants import TE_DType

FusedAttnBackend = {"F16_max512_seqlen": 0, "F16_arbitrary_seqlen": 1, "FP8": 2, "No_Backend": -1}


def fused_attn_fwd(
    is_training: bool,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fake_dtype: torch.dtype,
    fused_attention_backend: int,
    attn_bias: Tensor | None = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    page_table_k: Tensor | None = None,
    page_table_v: Tensor | None = None,
    s_quantizer: Any = None,
    o_quantizer: Any = None,
    attn_scale: float | None = None,
    dropout: float = 0.0,
    fast_zero_fill: bool = True,
    qkv_layout: str = "sbh3d",
    attn_bias_type: str = "no_bias",
    attn_mask_type: str = "padding",
    window_size: tuple[int, int] = (-1, -1),
    rng_gen: Any = None,
) -> tuple[Tensor, list[Tensor]]:
    rules.require(is_training, "without training there is no log-sum-exp")
    causal = _check(
        (q, k, v), (cu_seqlens_q, cu_seqlens_kv), (max_seqlen_q, max_seqlen_kv), fake_dtype,
        fused_attention_backend, dropout, qkv_layout, attn_bias_type, attn_mask_type, window_size,
    )  # fmt: skip
    output, sums = exact_attention.forward(*_by_heads(q, k, v), attn_scale, causal)
    statistics = sums.float()[..., None]
    return output.permute(2, 0, 1, 3).contiguous().to(q.dtype), [statistics, torch.tensor([5, 7])]


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    d_o: Tensor,
    fake_dtype: torch.dtype,
    dqkv_dtype: str,
    aux_ctx_tensors: list[Tensor],
    fused_attention_backend: int,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_kv_padded: Tensor | None = None,
    s_quantizer: Any = None,
    dp_quantizer: Any = None,
    dqkv_quantizer: Any = None,
    attn_scale: float | None = None,
    dropout: float = 0.0,
    fast_zero_fill: bool = True,
    qkv_layout: str = "sbh3d",
    attn_bias_type: str = "no_bias",
    attn_mask_type: str = "padding",
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> tuple[Tensor | None, ...]:
    rules.require(dqkv_dtype == TE_DType[q.dtype], "the gradients' type is one of Transformer Engine's")
    causal = _check(
        (q, k, v, o, d_o), (cu_seqlens_q, cu_seqlens_kv), (max_seqlen_q, max_seqlen_kv), fake_dtype,
        fused_attention_backend, dropout, qkv_layout, attn_bias_type, attn_mask_type, window_size,
    )  # fmt: skip
    statistics, random_state = aux_ctx_tensors
    rules.check_statistics(statistics, (q.shape[1], q.shape[2], q.shape[0], 1))
    rules.require(random_state.tolist() == [5, 7], "the forward's random state")
    rules.seen["te-cudnn"] = {"deterministic": deterministic}
    tensors = _by_heads(d_o, q, k, v, o)
    grads = exact_attention.backward(*tensors, statistics[..., 0], attn_scale, causal)
    return (*(grad.permute(2, 0, 1, 3).contiguous().to(q.dtype) for grad in grads), None)


def _check(
    tensors: tuple[Tensor, ...], offsets: tuple[Tensor, ...], lengths: tuple[int, ...], fake_dtype: Any,
    backend: Any, dropout: Any, layout: Any, bias: Any, mask: Any, window: Any,
) -> bool:  # fmt: skip
    query, key, *_ = tensors
    rules.require(backend == FusedAttnBackend["F16_arbitrary_seqlen"], "the kernel for any length")
    rules.require(fake_dtype is query.dtype and dropout == 0.0, "type and dropout")
    rules.require((layout, bias) == ("sbhd_sbhd_sbhd", "no_bias"), "layout and bias")
    rules.require((mask, window) in (("causal", (-1, 0)), ("no_mask", (-1, -1))), f"{mask} with {window}")
    rules.check_tensors(*tensors, heads=2)
    rules.require(all(tensor.is_contiguous() for tensor in tensors), "dense [s, b, heads, d] is needed")
    rules.require(key.shape[0] > 1, "cuDNN takes no single key")
    for starts, length, tensor in zip(offsets, lengths, (query, key), strict=True):
        rules.require(length == tensor.shape[0] and starts.dtype is torch.int32, "lengths")
        rules.require(starts.tolist() == [n * length for n in range(tensor.shape[1] + 1)], "offsets")
    return mask == "causal"


def _by_heads(*tensors: Tensor) -> list[Tensor]:
    return [tensor.permute(1, 2, 0, 3) for tensor in tensors]
