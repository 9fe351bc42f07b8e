"""Stand-ins for the attention kernels of PyTorch that need a GPU, behind its own dispatcher and schemas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import exact_attention
import torch
from torch import Tensor

from stand_ins import rules


@contextmanager
def aten_on_cpu() -> Iterator[None]:
    """CUDA's attention operators take tensors of CPUs."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for function in (
            _scaled_dot_product_cudnn_attention,
            _scaled_dot_product_cudnn_attention_backward,
            _scaled_dot_product_flash_attention,
            _scaled_dot_product_flash_attention_backward,
            _flash_attention_forward,
            _flash_attention_backward,
            _scaled_dot_product_efficient_attention,
            _scaled_dot_product_efficient_attention_backward,
        ):
            library.impl(function.__name__, function, "CPU")
        yield
    finally:
        library._destroy()


def _seeds() -> tuple[Tensor, Tensor]:
    return torch.tensor(11), torch.tensor(13)


def _check_seeds(seed: Tensor, offset: Tensor) -> None:
    rules.require((int(seed), int(offset)) == (11, 13), "not the forward's seed and offset")


def _check_dense(query: Tensor, key: Tensor, dropout: float, causal: bool) -> None:
    rules.require(dropout == 0.0, "dropout")
    rules.require(query.dim() == 4, "[b, heads, s, d] is needed")
    rules.require(not causal or query.shape[2] == key.shape[2], "causal needs as many keys as queries")


def _scaled_dot_product_cudnn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _check_dense(query, key, dropout_p, is_causal)
    rules.check_tensors(query, key, value, heads=1)
    rules.require(key.shape[2] > 1, "cuDNN takes no single key")
    rules.require(compute_log_sumexp and attn_bias is None, "log-sum-exp and bias")
    output, sums = exact_attention.forward(query, key, value, scale, is_causal)
    sizes = query.shape[2], key.shape[2]
    return (output.to(query.dtype), sums.float()[..., None], None, None, *sizes, *_seeds(), None)


def _scaled_dot_product_cudnn_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    attn_bias: Tensor | None,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    _check_dense(query, key, dropout_p, is_causal)
    rules.check_tensors(query, key, value, out, heads=1)
    rules.require((max_q, max_k) == (query.shape[2], key.shape[2]), "lengths")
    rules.require((attn_bias, cum_seq_q, cum_seq_k) == (None, None, None), "bias and offsets")
    rules.check_statistics(logsumexp, (*query.shape[:3], 1))
    _check_seeds(philox_seed, philox_offset)
    grads = exact_attention.backward(grad_out, query, key, value, out, logsumexp[..., 0], scale, is_causal)
    return tuple(grad.to(query.dtype) for grad in grads)


def _scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _check_dense(query, key, dropout_p, is_causal)
    rules.check_tensors(query, key, value, heads=1)
    output, sums = exact_attention.forward(query, key, value, scale, is_causal)
    sizes = query.shape[2], key.shape[2]
    return (output.to(query.dtype), sums.float(), None, None, *sizes, *_seeds(), query.new_empty(0))


def _scaled_dot_product_flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    _check_dense(query, key, dropout_p, is_causal)
    rules.check_tensors(query, key, value, out, heads=1)
    rules.require((max_q, max_k) == (query.shape[2], key.shape[2]), "lengths")
    rules.check_statistics(logsumexp, tuple(query.shape[:3]))
    _check_seeds(philox_seed, philox_offset)
    grads = exact_attention.backward(grad_out, query, key, value, out, logsumexp, scale, is_causal)
    return tuple(grad.to(query.dtype) for grad in grads)


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    **others: Any,
) -> tuple[Any, ...]:
    rules.require(query.dim() == 3 and dropout_p == 0.0 and is_causal, "packed, causal, without dropout")
    rules.check_tensors(query, key, value, heads=1)
    bounds = rules.bounds_of(cum_seq_q, max_q, query.shape[0])
    rules.require(bounds == rules.bounds_of(cum_seq_k, max_k, key.shape[0]), "queries and keys differ")
    output, sums = exact_attention.forward_packed(*_of_one(query, key, value), scale, bounds)
    return output[0].transpose(0, 1).to(query.dtype), sums[0].float(), *_seeds(), query.new_empty(0)


def _flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    **others: Any,
) -> tuple[Tensor, ...]:
    rules.require(dropout_p == 0.0 and is_causal, "causal, without dropout")
    rules.check_tensors(query, key, value, out, heads=1)
    rules.check_statistics(logsumexp, (query.shape[1], query.shape[0]))
    _check_seeds(rng_state, unused)
    bounds = rules.bounds_of(cum_seq_q, max_q, query.shape[0])
    grads = exact_attention.backward_packed(
        *_of_one(grad_out, query, key, value, out), logsumexp[None], scale, bounds
    )
    return tuple(grad[0].transpose(0, 1).to(query.dtype) for grad in grads)


def _scaled_dot_product_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _check_dense(query, key, dropout_p, is_causal)
    rules.require(query.shape[1] == key.shape[1] == value.shape[1], "grouped heads are not taken")
    rules.require(compute_log_sumexp and attn_bias is None, "log-sum-exp and bias")
    output, sums = exact_attention.forward(query, key, value, scale, is_causal)
    # Rows that no query has are whatever was in memory.
    padded = torch.nn.functional.pad(sums, (0, -query.shape[2] % 32), value=float("nan"))
    return (output.to(query.dtype), padded.float(), *_seeds())


def _scaled_dot_product_efficient_attention_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _check_dense(query, key, dropout_p, is_causal)
    rules.require(query.shape[1] == key.shape[1] == value.shape[1], "grouped heads are not taken")
    rules.require(attn_bias is None and list(grad_input_mask) == [True, True, True, False], "bias")
    length = query.shape[2]
    rules.check_statistics(logsumexp, (*query.shape[:2], length + -length % 32))
    _check_seeds(philox_seed, philox_offset)
    sums = logsumexp[..., :length]
    grads = exact_attention.backward(grad_out_, query, key, value, out, sums, scale, is_causal)
    return (*(grad.to(query.dtype) for grad in grads), None)


def _of_one(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(0, 1)[None] for tensor in tensors]
