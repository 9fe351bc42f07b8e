"""Weights on loan, on one rank: what is sent, computed with, added up and forgotten."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from helixpipe.plan import Loan
from helixpipe.runtime.lending import WeightLending
from helixpipe.runtime.message import HEADER_WORDS

LOAN = Loan(3, 0, 1, (4, 5))


def lending_of(*parameters, gradient_dtype=torch.float32):
    return WeightLending(
        lambda segment: parameters,
        lambda segment: [parameter.shape for parameter in parameters],
        parameters[0].dtype,
        gradient_dtype,
    )


def parameter(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.randn(*shape).to(dtype))


def test_layouts_differ_in_type_only():
    lending = lending_of(parameter(2, 3, dtype=torch.bfloat16), parameter(3, dtype=torch.bfloat16))
    weights, gradients = lending.weight_layout(3), lending.gradient_layout(3)
    assert weights.shapes == gradients.shapes == (torch.Size((2, 3)), torch.Size((3,)))
    assert (weights.dtype, gradients.dtype) == (torch.bfloat16, torch.float32)
    assert weights.num_bytes == 24 + HEADER_WORDS * 8  # 9 elements, filled up to 8 bytes


def test_weights_are_used_for_the_loans_micro_batches_only():
    own = parameter(2, 2)
    lending = lending_of(own)
    lending.borrow(LOAN, lending.lend(3))
    assert lending.weights_for(3, 3) is lending.weights_for(1, 4) is None
    assert lending.weights_for(3, 4) is lending.weights_for(3, 5)
    with pytest.raises(AssertionError, match="not given back"):
        lending.assert_empty()
    lending.forget(LOAN)
    assert lending.weights_for(3, 4) is None
    lending.assert_empty()


def test_gradients_are_added_in_the_owners_type():
    """Adding 1/256 to one in bfloat16 would change nothing."""
    lending = lending_of(parameter(2, dtype=torch.bfloat16))
    lending.borrow(LOAN, lending.lend(3))
    (weight,) = lending.weights_for(3, 4)
    for factor in (1.0, 1 / 256, 1 / 256):
        (weight * factor).sum().backward()
        assert weight.grad is None
    (total,) = lending.give_back(LOAN)
    assert total.dtype is torch.float32
    assert total.tolist() == [1 + 1 / 128] * 2


def test_a_weight_without_a_gradient_returns_zero():
    lending = lending_of(parameter(2), parameter(3))
    lending.borrow(LOAN, lending.lend(3))
    lending.weights_for(3, 5)[0].sum().backward()
    used, unused = lending.give_back(LOAN)
    assert used.tolist() == [1, 1]
    assert unused.tolist() == [0, 0, 0]


def test_returned_gradients_are_added_where_the_owner_has_its_own():
    plain, fresh, wrapped, frozen = (parameter(2) for _ in range(4))
    plain.grad = torch.ones(2)
    wrapped.main_grad = torch.ones(2, dtype=torch.float64)
    frozen.requires_grad_(False)
    buffer = torch.arange(8.0)
    lending_of(plain, fresh, wrapped, frozen).take_back(3, buffer.split(2))
    assert plain.grad.tolist() == [1, 2]
    assert fresh.grad.tolist() == [2, 3]
    assert wrapped.main_grad.tolist() == [5, 6]
    assert wrapped.grad is frozen.grad is None
    buffer.zero_()
    assert fresh.grad.tolist() == [2, 3], "the message's buffer may be used again"


def test_borrowed_weights_are_freed_as_soon_as_they_are_given_back():
    lending = lending_of(parameter(4))
    gc.disable()
    try:
        received = torch.randn(4)
        storage = StorageWeakRef(received.untyped_storage())
        lending.borrow(LOAN, received.split(4))
        del received
        lending.weights_for(3, 4)[0].sum().backward()
        assert not storage.expired()
        lending.give_back(LOAN)
        assert storage.expired()
    finally:
        gc.enable()
