"""Run a producer and its consumer without keeping what passes between them.

Recomputation without attention (HelixPipe, section "recomputation without attention") drops tensors that are
cheap to compute again: the output of a norm, the MLP's first half. Their consumers (a matrix product, the
core attention) save them for their own backward pass, so they are taken out of the consumer's graph and put
back just before that backward pass runs. Only the producer runs twice, never the consumer.

Nothing but references is dropped and put back: memory is freed as any other, when the last stream has done
with it, and what is computed again is used as it is, without a copy.

The idea is that of Megatron's ``CheckpointWithoutOutput``. That one empties the storage under the saved
tensors and copies what is computed again into it, holds both until the producer's backward pass is over,
reads and sets all random states for producers that draw no random numbers, and in 0.16.1 needs Transformer
Engine unless it is told ``fp8=None``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from helixpipe.gradient_edges import edge_of
from helixpipe.layers.borrowed_modules import with_same_weights

Tensors = tuple[Tensor, ...]


def recompute(produce: Callable[..., Tensors], consume: Callable[..., Tensors], *inputs: Tensor) -> Tensors:
    """``consume(*produce(*inputs))``; the backward pass computes ``produce`` again.

    Args:
        produce: draws no random numbers. What it returns is used by ``consume`` only.
        consume: may save its arguments and views of them for its backward pass, but no copies: those would
            stay. Beside its arguments it computes with leaves of the graph.
        inputs: are kept, and must not be changed in place.

    Returns:
        What ``consume`` returns.
    """
    if not (torch.is_grad_enabled() and any(input.requires_grad for input in inputs)):
        return consume(*produce(*inputs))
    production = _Production(with_same_weights(produce))
    produced = _Produce.apply(production, *inputs)
    consumed = consume(*produced)
    production.release(produced, inputs, consumed)
    for tensor in consumed:
        if tensor.requires_grad:
            tensor.register_hook(production.regain)
    return consumed


class _Absent:
    """In the place of a tensor that a consumer has saved, a view of one that is computed again."""

    __slots__ = ("__weakref__", "index", "offset", "shape", "stride", "tensor")

    def __init__(self, index: int, saved: Tensor) -> None:
        self.index = index
        self.shape, self.stride, self.offset = saved.shape, saved.stride(), saved.storage_offset()
        self.tensor: Tensor | None = None

    def view_of(self, again: Tensor) -> Tensor:
        """The view, at the same place in the storage of ``again``."""
        return again.as_strided(self.shape, self.stride, self.offset)

    def unpack(self) -> Tensor:
        """What is put back, for the consumer's backward pass."""
        assert self.tensor is not None, "nothing that was consumed has a gradient yet"
        return self.tensor


class _Production:
    """What was produced, between its release in the forward and its return in the backward pass."""

    def __init__(self, produce: Callable[..., Tensors]) -> None:
        self.produce = produce
        # The node in autograd's graph. It knows nothing of this object, which the consumer's hooks hold: so
        # there is no cycle, and a graph that is never differentiated is freed like any other.
        self.node: Any = None
        # Held by the consumer's graph, so that what is put back ends with it.
        self._absent: list[weakref.ref[_Absent]] = []
        self._layouts: dict[int, tuple[int, tuple[int, ...]]] = {}

    def release(self, produced: Tensors, inputs: Tensors, consumed: Tensors) -> None:
        """Take ``produced`` out of the consumer's graph, but for what is a view of its result or an input.

        A norm that is fused into the next layer is an identity here: what it produces is the input.
        """
        needed = {_address(tensor) for tensor in (*inputs, *consumed)}
        indices: dict[int, int] = {}
        for index, tensor in enumerate(produced):
            if _address(tensor) not in needed:
                indices.setdefault(_address(tensor), index)
                self._layouts[index] = int(tensor.storage_offset()), tensor.stride()
        for tensor, saved in saved_between(consumed, self.node):
            owner = indices.get(_address(tensor))
            if owner is not None and tensor.dtype is produced[owner].dtype:
                absent = _Absent(owner, tensor)
                self._absent.append(weakref.ref(absent))
                # Hooks of others stay: they have put the tensor where they want it.
                with suppress(RuntimeError):
                    saved.register_hooks(_always(absent), _Absent.unpack)

    def regain(self, grad: Tensor) -> None:
        """Compute again and put back; a hook of every consumed tensor, of which the first acts."""
        if self.node is None:
            return
        kept = self.node.saved_tensors
        inputs = tuple(input.detach().requires_grad_(input.requires_grad) for input in kept)
        with torch.enable_grad():
            produced = self.produce(*inputs)
        for index, layout in self._layouts.items():
            # Views of one storage come back together, at the same places in it.
            assert layout == (produced[index].storage_offset(), produced[index].stride())
        for reference in self._absent:
            absent = reference()
            if absent is not None:
                absent.tensor = absent.view_of(produced[absent.index].detach())
        # Edges instead of tensors: what nobody has saved ends here.
        self.node.inputs, self.node.edges = inputs, tuple(map(edge_of, produced))
        self.node, self._absent, self._layouts = None, [], {}


class _Produce(torch.autograd.Function):
    """The producer without a graph of its own; :meth:`_Production.regain` makes one for the backward pass."""

    @staticmethod
    def forward(ctx: Any, production: _Production, *inputs: Tensor) -> Tensors:
        ctx.save_for_backward(*inputs)
        production.node = ctx
        return production.produce(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The parameters of the producer get their gradients here, as from any backward pass.
        pairs = [(edge, grad) for edge, grad in zip(ctx.edges, grads, strict=True) if edge is not None]
        edges, grads = zip(*pairs, strict=True)
        torch.autograd.backward(edges, grads)
        of_inputs = [input.grad for input in ctx.inputs]
        ctx.inputs = ctx.edges = None
        return None, *of_inputs


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _always(packed: _Absent) -> Callable[[Tensor], _Absent]:
    return lambda tensor: packed


def saved_between(outputs: Iterable[Tensor], end: Any = None) -> Iterator[tuple[Tensor, Any]]:
    """What the nodes from ``outputs`` back to the node ``end`` have saved, and where, as a ``SavedTensor``.

    Args:
        outputs: of a graph.
        end: neither it nor what is only before it is looked at; None looks at the whole graph.
    """
    pending: list[Any] = [tensor.grad_fn for tensor in outputs]
    seen: set[Any] = {None, end}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        kind: type = type(node)
        for name in _names_of_saved(kind):
            values, places = getattr(node, name), getattr(node, f"_raw_{name.lstrip('_')}")
            if not isinstance(places, tuple):
                values, places = (values,), (places,)
            for value, place in zip(values, places, strict=True):
                if isinstance(value, Tensor):
                    yield value, place
        pending += [before for before, _ in node.next_functions]


@cache
def _names_of_saved(kind: type) -> tuple[str, ...]:
    """Attributes of a kind of node that hold saved tensors: one for a function in Python."""
    if issubclass(kind, torch.autograd.function.BackwardCFunction):
        return ("saved_tensors",)
    return tuple(name for name in dir(kind) if name.startswith("_saved_") and hasattr(kind, f"_raw{name}"))
