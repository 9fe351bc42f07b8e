"""Megatron's modules without some of their matrix products: what stands before, between and after them."""

from __future__ import annotations

from copy import copy
from typing import TypeVar

import torch
from torch import Tensor

Module = TypeVar("Module", bound=torch.nn.Module)


def without_products(module: Module, **biases: Tensor | None) -> Module:
    """A module of Megatron's in which some linear layers pass on what they are given, with these biases."""
    half = copy(module)
    passing = {name: _PassThrough(bias) for name, bias in biases.items()}
    half._modules = {**module._modules, **passing}
    return half


class _PassThrough(torch.nn.Module):
    """In the place of a linear layer whose product is there already, or is not wanted."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.given = (bias,)  # in a tuple: no parameter of this module

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is given, and the bias that the next step adds."""
        return given, self.given[0]
