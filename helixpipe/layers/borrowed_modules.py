"""Modules without weights, which compute with those that a call brings along.

What a backward pass computes again, it computes after that call: with :func:`with_same_weights` a function
takes the weights along that are in the modules when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call

Result = TypeVar("Result")

# Calls a function with the weights that are in the modules now; None unless weights are borrowed.
_inside: ContextVar[Callable[..., Any] | None] = ContextVar("inside", default=None)


class BorrowedModules(torch.nn.Module):
    """Modules without weights: every call brings along those that some rank owns.

    Megatron builds modules with their weights; these give theirs up at once.

    Args:
        modules: by name.
    """

    def __init__(self, **modules: torch.nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module.to_empty(device="meta"))
        self.names = [name for name, _ in self.named_parameters()]

    def compute(self, function: Callable[..., Result], weights: Sequence[Tensor], *arguments: Any) -> Result:
        """``function(*modules, *arguments)`` with these weights in the modules, in the order of ``names``."""
        inside = partial(self._call, dict(zip(self.names, weights, strict=True)))
        token = _inside.set(inside)
        try:
            return inside(function, *self.children(), *arguments)
        finally:
            _inside.reset(token)

    def _call(self, weights: dict[str, Tensor], function: Callable[..., Result], *arguments: Any) -> Result:
        found: Result = functional_call(self, weights, (function, *arguments))
        return found

    def forward(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Not to be called but by :meth:`compute`, which puts the weights in their places."""
        return function(*arguments)


def with_same_weights(function: Callable[..., Result]) -> Callable[..., Result]:
    """``function``, to be called later with the weights that borrowed modules have now."""
    inside = _inside.get()
    return function if inside is None else partial(inside, function)
