"""How much a forward pass keeps for its backward pass, and how large tensors become on the way."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Kept:
    """``Kept(model, outputs).bytes(inputs)``: what the graph of ``outputs`` holds on to.

    Weights do not count. Storage counts once. Tensors that are computed again are not in the graph.
    """

    def __init__(self, model: torch.nn.Module, outputs: Iterable[Tensor]) -> None:
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._saved: list[Tensor] = []
        for place in saved_in_graph(outputs):
            # Where data was taken away, hooks of the one who took it are in the way.
            with suppress(RuntimeError):
                place.register_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        self._saved.append(tensor)
        return tensor.detach()

    def bytes(self, inputs: Iterable[Tensor] = ()) -> int:
        """Bytes of what was saved and of ``inputs``, which the executor keeps for their gradients."""
        storages = {}
        for tensor in (*self._saved, *inputs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def saved_in_graph(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """The places of all saved tensors, as :class:`SavedTensor`."""
    pending: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            for name in dir(node):
                if name.startswith("_raw_saved_"):
                    places = getattr(node, name)
                    yield from places if isinstance(places, tuple) else (places,)
            pending += [before for before, _ in node.next_functions]


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.numel() * leaf.element_size())
        return result


class LiveKept:
    """``with LiveKept(model) as live: …``: what graphs hold at any moment, as tensors come and go.

    Whole numbers (tokens, labels, positions) and weights do not count; storage counts once.

    Attributes:
        peak: the largest number of bytes that was held, noted when something is saved.
    """

    def __init__(self, model: torch.nn.Module, others: Callable[[], Iterable[Tensor]] = tuple) -> None:
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._others = others
        self._boxes: weakref.WeakSet[_Box] = weakref.WeakSet()
        self._hooks = saved_tensors_hooks(self._note, lambda box: box.tensor)
        self.peak = 0

    def _note(self, tensor: Tensor) -> _Box:
        box = _Box(tensor)
        self._boxes.add(box)
        self.peak = max(self.peak, self.bytes())
        return box

    def __enter__(self) -> LiveKept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def bytes(self) -> int:
        """Bytes of what graphs hold now, and of the ``others``."""
        storages = {}
        for tensor in (*(box.tensor for box in self._boxes), *self._others()):
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and storage.data_ptr() not in self._weights:
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


class _Box:
    """Stands for a saved tensor in a graph, and ends with it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
