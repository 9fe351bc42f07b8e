"""Stand-in for FlashAttention-3: signatures and refusals of the package, results in float64.

Tensors are [b, s, heads, d], or [T, heads, d] with offsets; log-sum-exps [b, heads, s] or [heads, T].
"""

from __future__ import annotations

from typing import Any

import exact_attention
import torch
from stand_ins import rules
from torch import Tensor


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    unused = (
        k_new, v_new, qv, out_, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k,
        rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, scheduler_metadata,
    )  # fmt: skip
    rules.require(all(argument is None for argument in unused), "arguments of inference")
    bounds = _bounds(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _check(q, k, v, scale=softmax_scale, causal=causal, packed=bounds is not None)
    nothing = torch.tensor([])
    if bounds is None:
        output, sums = exact_attention.forward(*_by_heads(q, k, v), softmax_scale, causal, softcap)
        return output.transpose(1, 2).contiguous().to(q.dtype), sums.float(), nothing, nothing
    output, sums = exact_attention.forward_packed(*_of_one(q, k, v), softmax_scale, bounds, softcap)
    return output[0].transpose(0, 1).contiguous().to(q.dtype), sums[0].float(), nothing, nothing


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    rules.require(sequed_q is None and sequed_k is None, "arguments of inference")
    rules.require(type(deterministic) is bool, "deterministic must be a bool")
    rules.seen["flash-attn-3"] = {"deterministic": deterministic}
    bounds = _bounds(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    dout, q, k, v, out = (t if t.stride(-1) == 1 else t.contiguous() for t in (dout, q, k, v, out))
    _check(q, k, v, out, dout, scale=softmax_scale, causal=is_causal, packed=bounds is not None)
    rules.check_places((dq, dk, dv), (q, k, v))
    if bounds is None:
        rules.check_statistics(softmax_lse, (q.shape[0], q.shape[2], q.shape[1]))
        tensors = _by_heads(dout, q, k, v, out)
        grads = exact_attention.backward(*tensors, softmax_lse, softmax_scale, is_causal, softcap)
        grads = [grad.transpose(1, 2) for grad in grads]
    else:
        rules.check_statistics(softmax_lse, (q.shape[1], q.shape[0]))
        tensors = _of_one(dout, q, k, v, out)
        grads = exact_attention.backward_packed(*tensors, softmax_lse[None], softmax_scale, bounds, softcap)
        grads = [grad[0].transpose(0, 1) for grad in grads]
    for place, grad in zip((dq, dk, dv), grads, strict=True):
        place.copy_(grad)
    return q.new_empty(0)


def _check(*tensors: Tensor, scale: Any, causal: Any, packed: bool) -> None:
    rules.require(type(scale) is float and type(causal) is bool, "scale and causal are a number and a bool")
    rules.require(tensors[0].dim() == (3 if packed else 4), "dimensions")
    rules.require(causal or not packed, "packed sequences are causal here")
    rules.check_tensors(*tensors, heads=-2)


def _by_heads(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def _of_one(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(0, 1)[None] for tensor in tensors]


def _bounds(q: Tensor, k: Tensor, of_q: Any, of_k: Any, longest_q: Any, longest_k: Any) -> Any:
    if of_q is None:
        rules.require((of_k, longest_q, longest_k) == (None, None, None), "lengths without offsets")
        return None
    bounds = rules.bounds_of(of_q, longest_q, q.shape[0])
    rules.require(bounds == rules.bounds_of(of_k, longest_k, k.shape[0]), "queries and keys differ")
    return bounds
