"""Attention over a sequence that the ranks of a context group share.

A sequence is cut into 2c pieces of one length, and rank r of c has pieces r and 2c-1-r, as Megatron's
``get_batch_on_this_cp_rank`` deals them out: under a causal mask all ranks then have the same work. Keys and
values of the whole sequence are gathered, while queries attend to their own piece; a piece then attends to
all keys before it without a mask, and results merge by log-sum-exp. In the backward pass keys and values are
gathered again, not kept, and what every rank finds for all of them is summed where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from helixpipe.kernels import merge_attention
from helixpipe.layers.attention.interface import AttentionBackend, ForwardResult


def own_pieces(tensor: Tensor, dim: int, size: int, rank: int) -> Tensor:
    """What one rank of a context group has of a sequence.

    Args:
        tensor: of whole sequences, a multiple of ``2 * size`` tokens.
        dim: that of tokens.
        size: ranks of the group.
        rank: in the group.
    """
    if size <= 1:  # 0: there are no groups
        return tensor
    pieces = tensor.unflatten(dim, (2 * size, -1))
    first, second = (pieces.select(dim, piece) for piece in (rank, 2 * size - 1 - rank))
    return torch.cat((first, second), dim)


class _Piece(NamedTuple):
    """One of a rank's two pieces.

    Attributes:
        local: where it is in this rank's tokens.
        start: of it in the whole sequence.
    """

    local: slice
    start: int


def _pieces(length: int, group: dist.ProcessGroup) -> Iterator[_Piece]:
    """Of this rank, which has ``length`` tokens."""
    size, rank, half = group.size(), group.rank(), length // 2
    for place, number in enumerate((rank, 2 * size - 1 - rank)):
        yield _Piece(slice(place * half, (place + 1) * half), number * half)


class _WholeSequence:
    """Keys and values of all ranks, on their way.

    Args:
        key, value: [b, groups, s/c, d], of this rank.
        group: of context parallelism.
    """

    def __init__(self, key: Tensor, value: Tensor, group: dist.ProcessGroup) -> None:
        own = torch.stack((key.permute(2, 0, 1, 3), value.permute(2, 0, 1, 3)), dim=1)
        self._gathered = own.new_empty((group.size(), 2, own.shape[0] // 2, *own.shape[1:]))
        self._work = dist.all_gather_into_tensor(
            self._gathered.flatten(0, 2), own, group=group, async_op=True
        )

    def arrived(self) -> tuple[Tensor, Tensor]:
        """Key and value [b, groups, s, d] in the order of the sequence."""
        self._work.wait()
        first, second = self._gathered[:, 0], self._gathered[:, 1].flip(0)
        key, value = torch.cat((first, second)).flatten(0, 1).permute(1, 2, 3, 0, 4)
        return key, value


def _summed(grads: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s, ...] of each rank -> [s/c, ...], summed over ranks, for this rank's tokens."""
    first, second = grads.unflatten(0, (2, group.size(), -1))
    dealt = torch.stack((first, second.flip(0)), dim=1)
    own = grads.new_empty((grads.shape[0] // group.size(), *grads.shape[1:]))
    dist.reduce_scatter_tensor(own, dealt.flatten(0, 2), group=group)
    return own


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        backend: AttentionBackend,
        group: dist.ProcessGroup,
    ) -> Tensor:
        whole = _WholeSequence(key, value, group)
        pieces = list(_pieces(query.shape[2], group))
        own = []
        for piece in pieces:
            own_query, own_key, own_value = _at(piece.local, query, key, value)
            own.append(backend.forward(own_query, own_key, own_value, scale))
        keys, values = whole.arrived()
        outputs, extra = [], []
        for piece, (output, log_sum_exp, of_own) in zip(pieces, own, strict=True):
            before: tuple[Any, ...] = ()
            if piece.start:
                earlier_keys, earlier_values = _at(slice(piece.start), keys, values)
                part = backend.forward(
                    query[:, :, piece.local], earlier_keys, earlier_values, scale, causal=False
                )
                before = part.extra
                # Sums of 16-bit parts are rounded once.
                total = output.to(log_sum_exp.dtype)
                merge_attention(total, log_sum_exp, part.output, part.log_sum_exp)
                output = total.to(output.dtype)
            outputs.append(output)
            extra.append((of_own, before))
        result = torch.cat(outputs, dim=2)
        sums = torch.cat([found.log_sum_exp for found in own], dim=2)
        ctx.save_for_backward(query, key, value, result, sums)
        ctx.scale, ctx.backend, ctx.group, ctx.extra = scale, backend, group, extra
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        whole = _WholeSequence(key, value, ctx.group)
        pieces = list(_pieces(query.shape[2], ctx.group))
        of_pieces = []
        for piece, extra in zip(pieces, ctx.extra, strict=True):
            grad_own, own_query, own_key, own_value = _at(piece.local, grad, query, key, value)
            merged, sums = _at(piece.local, output, log_sum_exp)
            own, before = (ForwardResult(merged, sums, found) for found in extra)
            gradients = ctx.backend.backward(grad_own, own_query, own_key, own_value, own, ctx.scale)
            of_pieces.append((piece, grad_own, own_query, before, gradients))
        keys, values = whole.arrived()
        batch, groups, length, size = keys.shape
        # Sums of 16-bit parts, and of ranks, are rounded once.
        total = log_sum_exp.new_zeros((length, 2, batch, groups, size))
        of_keys, of_values = total.permute(1, 2, 3, 0, 4)
        of_query = []
        for piece, grad_own, own_query, before, (grad_query, grad_key, grad_value) in of_pieces:
            here, earlier = slice(piece.start, piece.start + grad_key.shape[2]), slice(piece.start)
            of_keys[:, :, here] += grad_key
            of_values[:, :, here] += grad_value
            if piece.start:
                earlier_keys, earlier_values = _at(earlier, keys, values)
                more_query, more_key, more_value = ctx.backend.backward(
                    grad_own, own_query, earlier_keys, earlier_values, before, ctx.scale, causal=False
                )
                of_keys[:, :, earlier] += more_key
                of_values[:, :, earlier] += more_value
                grad_query = (grad_query.to(total.dtype) + more_query).to(query.dtype)
            of_query.append(grad_query)
        grad_key, grad_value = _summed(total, ctx.group).to(key.dtype).permute(1, 2, 3, 0, 4)
        return torch.cat(of_query, dim=2), grad_key, grad_value, None, None, None


def _at(tokens: slice, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tokens of tensors [b, heads or groups, s, ...]."""
    return tuple(tensor[:, :, tokens] for tensor in tensors)


def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    backend: AttentionBackend,
    group: dist.ProcessGroup,
) -> Tensor:
    """Causal attention of this rank's tokens over the whole sequence; collective over the group.

    Args:
        query: [b, heads, s/c, d], of this rank's pieces.
        key: [b, groups, s/c, d].
        value: like ``key``.
        scale: factor of the scores.
        backend: what computes it.
        group: of context parallelism, with c ranks.

    Returns:
        Like ``query``.
    """
    output: Tensor = _ContextAttention.apply(query, key, value, scale, backend, group)
    return output
