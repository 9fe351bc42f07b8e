"""Where gradients enter a graph whose results are gone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

# Since torch 2.7 an edge keeps the node of a function in Python alive; before, only its tensors do.
_KEEPS_NODES = "ownership_token" in GradientEdge._fields


def edge_of(tensor: Tensor) -> GradientEdge | None:
    """The edge at which a gradient of ``tensor`` enters; None if it needs none.

    It stands for the tensor, whose data may be freed.
    """
    if not tensor.requires_grad:
        return None
    if not _KEEPS_NODES and isinstance(tensor.grad_fn, BackwardCFunction):
        # The node of a view is kept, and what it comes from with it.
        with torch.enable_grad():
            tensor = tensor.view_as(tensor)
    return get_gradient_edge(tensor)
