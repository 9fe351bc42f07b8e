"""Run a producer and its consumer without keeping what passes between them.

Recomputation without attention (HelixPipe, section "recomputation without attention") drops tensors that are
cheap to compute again: the output of a norm, the MLP's first half. Their consumers (a matrix product, the
core attention) save them for their own backward pass, so the data is taken away under the saved tensor and
put back just before that backward pass runs. Only the producer runs twice, never the consumer.

The idea is that of Megatron's ``CheckpointWithoutOutput``. That one holds the recomputed output beside the
restored one until the producer's backward pass is over, reads and sets all random states for producers that
draw no random numbers, and in 0.16.1 needs Transformer Engine unless it is told ``fp8=None``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from helixpipe.layers.borrowed_modules import with_same_weights

Tensors = tuple[Tensor, ...]


def recompute(
    produce: Callable[[Tensor], Tensors], consume: Callable[..., Tensors], input: Tensor
) -> Tensors:
    """``consume(*produce(input))``; the backward pass computes ``produce`` again.

    Args:
        produce: draws no random numbers. What it returns is used by ``consume`` only.
        consume: may save its arguments and views of them, but no copies: those would stay.
        input: is kept, and must not be changed in place.

    Returns:
        What ``consume`` returns.
    """
    if not (torch.is_grad_enabled() and input.requires_grad):
        return consume(*produce(input))
    production = _Production(with_same_weights(produce))
    produced = _Produce.apply(production, input)
    consumed = consume(*produced)
    production.release(produced, needed=(input, *consumed))
    for tensor in consumed:
        if tensor.requires_grad:
            tensor.register_hook(production.regain)
    return consumed


class _Production:
    """What was produced, between its release in the forward and its return in the backward pass."""

    def __init__(self, produce: Callable[[Tensor], Tensors]) -> None:
        self.produce = produce
        # The node in autograd's graph. It knows nothing of this object, which the consumer's hooks hold: so
        # there is no cycle, and a graph that is never differentiated is freed like any other.
        self.node: Any = None
        self._released: list[tuple[int, Tensor]] = []

    def release(self, produced: Tensors, needed: Tensors) -> None:
        """Free the data of ``produced``, but for what is (a view of) a ``needed`` tensor.

        A norm that is fused into the next layer is an identity here: what it produces is the input.
        """
        seen = {_address(tensor) for tensor in needed}
        for index, tensor in enumerate(produced):
            if _address(tensor) not in seen:
                seen.add(_address(tensor))
                self._released.append((index, tensor))
        for _, tensor in self._released:
            tensor.untyped_storage().resize_(0)

    def regain(self, grad: Tensor) -> None:
        """Compute again and put the data back; a hook of every consumed tensor, of which the first acts."""
        if self.node is None:
            return
        (input,) = self.node.saved_tensors
        input = input.detach().requires_grad_()
        with torch.enable_grad():
            produced = self.produce(input)
        for index, tensor in self._released:
            # Views of one storage come back together, at the same places in it.
            again, storage = produced[index], tensor.untyped_storage()
            assert again.storage_offset() == tensor.storage_offset()
            assert again.stride() == tensor.stride()
            storage.resize_(again.untyped_storage().nbytes())
            storage.copy_(again.untyped_storage())
        # Edges instead of tensors: the second copy of the data ends here.
        self.node.input, self.node.edges = input, _edges(produced)
        self.node, self._released = None, []


class _Produce(torch.autograd.Function):
    """The producer without a graph of its own; :meth:`_Production.regain` makes one for the backward pass."""

    @staticmethod
    def forward(ctx: Any, production: _Production, input: Tensor) -> Tensors:
        ctx.save_for_backward(input)
        production.node = ctx
        return production.produce(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        # The parameters of the producer get their gradients here, as from any backward pass.
        pairs = [(edge, grad) for edge, grad in zip(ctx.edges, grads, strict=True) if edge is not None]
        edges, grads = zip(*pairs, strict=True)
        torch.autograd.backward(edges, grads)
        grad_input = ctx.input.grad
        ctx.input = ctx.edges = None
        return None, grad_input


def _edges(tensors: Tensors) -> tuple[GradientEdge | None, ...]:
    return tuple(get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in tensors)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
