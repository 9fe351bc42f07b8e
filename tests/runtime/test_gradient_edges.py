"""Edges keep a graph alive whose results are gone, as every release of torch has them."""

import gc

import pytest
import torch

from helixpipe import gradient_edges
from helixpipe.gradient_edges import edge_of


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@pytest.mark.parametrize("keeps_nodes", [True, False], ids=["as it is", "before 2.7"])
@pytest.mark.parametrize(
    "compute", [Twice.apply, lambda x: 2 * x, lambda x: x], ids=["Python", "C++", "leaf"]
)
def test_a_gradient_enters_where_a_result_was(compute, keeps_nodes, monkeypatch):
    if not keeps_nodes:
        monkeypatch.setattr(gradient_edges, "_KEEPS_NODES", False)
    x = torch.ones(3, requires_grad=True)
    y = compute(x)
    factor = 1 if y is x else 2
    with torch.no_grad():
        edge = edge_of(y)
    del y
    gc.collect()
    torch.autograd.backward([edge], [torch.arange(3.0)])
    assert torch.equal(x.grad, factor * torch.arange(3.0))


def test_what_needs_no_gradient_has_no_edge():
    assert edge_of(torch.ones(3)) is None
