"""Stand-in for FlashAttention 2.7 and newer: signatures and refusals of the package, results in float64.

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
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_options(dropout_p, softmax_scale, window_size_left, window_size_right, softcap, alibi_slopes)
    q, k, v = _dense(q, k, v)
    rules.require(q.dim() == 4 and not return_softmax, "[b, s, heads, d] is needed")
    rules.check_tensors(q, k, v, heads=2)
    output, sums = exact_attention.forward(*_by_heads(q, k, v), softmax_scale, causal, softcap)
    return output.transpose(1, 2).contiguous().to(q.dtype), sums.float(), q.new_empty(0), _random_state()


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    _check_options(dropout_p, softmax_scale, window_size_left, window_size_right, softcap, alibi_slopes)
    _note(deterministic, rng_state)
    dout, q, k, v, out = _dense(dout, q, k, v, out)
    rules.check_tensors(q, k, v, out, dout, heads=2)
    rules.check_statistics(softmax_lse, (q.shape[0], q.shape[2], q.shape[1]))
    rules.check_places((dq, dk, dv), (q, k, v))
    tensors = _by_heads(dout, q, k, v, out)
    grads = exact_attention.backward(*tensors, softmax_lse, softmax_scale, causal, softcap)
    for place, grad in zip((dq, dk, dv), grads, strict=True):
        place.copy_(grad.transpose(1, 2))
    return q.new_empty(0)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_options(dropout_p, softmax_scale, window_size_left, window_size_right, softcap, alibi_slopes)
    rules.require(causal and not return_softmax, "packed sequences are causal here")
    q, k, v = _dense(q, k, v)
    rules.check_tensors(q, k, v, heads=1)
    bounds = _bounds(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    output, sums = exact_attention.forward_packed(*_of_one(q, k, v), softmax_scale, bounds, softcap)
    return (
        output[0].transpose(0, 1).contiguous().to(q.dtype),
        sums[0].float(),
        q.new_empty(0),
        _random_state(),
    )


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    _check_options(dropout_p, softmax_scale, window_size_left, window_size_right, softcap, alibi_slopes)
    _note(deterministic, rng_state)
    rules.require(causal, "packed sequences are causal here")
    dout, q, k, v, out = _dense(dout, q, k, v, out)
    rules.check_tensors(q, k, v, out, dout, heads=1)
    rules.check_statistics(softmax_lse, (q.shape[1], q.shape[0]))
    rules.check_places((dq, dk, dv), (q, k, v))
    bounds = _bounds(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    grads = exact_attention.backward_packed(
        *_of_one(dout, q, k, v, out), softmax_lse[None], softmax_scale, bounds, softcap
    )
    for place, grad in zip((dq, dk, dv), grads, strict=True):
        place.copy_(grad[0].transpose(0, 1))
    return q.new_empty(0)


def _check_options(dropout: Any, scale: Any, left: Any, right: Any, softcap: Any, slopes: Any) -> None:
    rules.require(type(dropout) is float and dropout == 0.0, "dropout")
    rules.require(type(scale) is float, "the scale must be a number")
    rules.require((left, right, slopes) == (-1, -1, None), "windows and slopes")
    rules.require(type(softcap) is float and softcap >= 0.0, "the cap must be a number")


def _note(deterministic: bool, random_state: Tensor | None) -> None:
    rules.require(type(deterministic) is bool, "deterministic must be a bool")
    rules.require(random_state is not None and random_state.tolist() == [5, 7], "the forward's random state")
    rules.seen["flash-attn-2"] = {"deterministic": deterministic}


def _random_state() -> Tensor:
    return torch.tensor([5, 7])


def _dense(*tensors: Tensor) -> list[Tensor]:
    """The package's own wrapper copies what has no dense last dimension."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def _by_heads(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def _of_one(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(0, 1)[None] for tensor in tensors]


def _bounds(q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor, longest_q: int, longest_k: int) -> Any:
    bounds = rules.bounds_of(of_q, longest_q, q.shape[0])
    rules.require(bounds == rules.bounds_of(of_k, longest_k, k.shape[0]), "queries and keys differ")
    return bounds
