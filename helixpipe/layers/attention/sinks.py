"""Attention sinks: one more key for every query, with a score of its head's own and no value.

Megatron's ``softmax_type`` and gpt-oss have them (arXiv 2309.17453). They change nothing in a kernel: what it
gives over the keys is merged with the sink by the log-sum-exp, and a backward pass that takes the merged
output and log-sum-exp gives the gradients of query, key and value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_sink(output: Tensor, log_sum_exp: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over the keys and the sink.

    Args:
        output: [b, heads, s, d], over the keys.
        log_sum_exp: [b, heads, s], of their scores.
        sink: [heads], its scores; None for no sink.

    Returns:
        Output and log-sum-exp with it.
    """
    if sink is None:
        return output, log_sum_exp
    total = torch.logaddexp(log_sum_exp, sink.detach().to(log_sum_exp.dtype)[:, None])
    share = (log_sum_exp - total).exp_()[..., None]
    return output.to(share.dtype).mul(share).to(output.dtype), total


def sink_gradient(grad: Tensor, output: Tensor, log_sum_exp: Tensor, sink: Tensor | None) -> Tensor | None:
    """The gradient of the sinks' scores, [heads].

    Args:
        grad: of the output.
        output, log_sum_exp: as :func:`merge_sink` has returned them.
        sink: as it was given.
    """
    if sink is None:
        return None
    wide = log_sum_exp.dtype
    share = (sink.to(wide)[:, None] - log_sum_exp).exp_()
    lost = (grad.to(wide) * output.to(wide)).sum(dim=-1)
    return -(share * lost).sum(dim=(0, 2)).to(sink.dtype)
