"""Weights on loan: what an owner sends and takes back, and what a borrower computes with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from helixpipe.kernels.choice import add_gradient
from helixpipe.plan.loan import Loan
from helixpipe.runtime.message import MessageLayout

Tensors = tuple[Tensor, ...]


class _Borrowed(NamedTuple):
    weights: Tensors
    sums: list[Tensor | None]  # of their gradients


class WeightLending:
    """This rank's weights that others use, and the weights of others that this rank uses.

    A borrowed weight is a leaf of autograd. Its gradients are added up here, over the micro batches of the
    loan, in the type in which the owner adds up its own.

    Args:
        parameters: the parameters that this rank owns and lends for a segment, in a fixed order and ready to
            be read.
        shapes: of the parameters of any segment that is on loan somewhere, in the same order.
        dtype: of the parameters.
        gradient_dtype: of their gradients' sums.
    """

    def __init__(
        self,
        parameters: Callable[[int], Sequence[torch.nn.Parameter]],
        shapes: Callable[[int], Sequence[torch.Size]],
        dtype: torch.dtype,
        gradient_dtype: torch.dtype,
    ) -> None:
        self._parameters = parameters
        self._shapes = shapes
        self._dtype = dtype
        self._gradient_dtype = gradient_dtype
        self._borrowed: dict[Loan, _Borrowed] = {}
        self._weights: dict[tuple[int, int], Tensors] = {}

    def weight_layout(self, segment: int) -> MessageLayout:
        """Layout of a segment's weights."""
        return MessageLayout(tuple(self._shapes(segment)), self._dtype)

    def gradient_layout(self, segment: int) -> MessageLayout:
        """Layout of the gradients of a segment's weights."""
        return MessageLayout(tuple(self._shapes(segment)), self._gradient_dtype)

    def lend(self, segment: int) -> Tensors:
        """The weights to send."""
        return tuple(parameter.detach() for parameter in self._parameters(segment))

    def borrow(self, loan: Loan, weights: Tensors) -> None:
        """Use ``weights`` for the loan's micro batches from now on."""
        leaves = tuple(weight.detach().requires_grad_() for weight in weights)
        sums: list[Tensor | None] = [None] * len(leaves)
        for index, leaf in enumerate(leaves):
            # Refers to the sums alone, so that the weights are freed as soon as they are given back.
            leaf.register_post_accumulate_grad_hook(
                partial(_move_gradient, sums, index, self._gradient_dtype)
            )
        self._borrowed[loan] = _Borrowed(leaves, sums)
        self._weights.update(((loan.segment, i), leaves) for i in loan.micro_batches)

    def weights_for(self, segment: int, micro_batch: int) -> Tensors | None:
        """The borrowed weights to compute with, or None where this rank's own are to be used."""
        return self._weights.get((segment, micro_batch))

    def forget(self, loan: Loan) -> _Borrowed:
        """Let go of the weights."""
        for micro_batch in loan.micro_batches:
            del self._weights[loan.segment, micro_batch]
        return self._borrowed.pop(loan)

    def give_back(self, loan: Loan) -> Tensors:
        """Let go of the weights; the sums of their gradients, zero for a weight that was not used."""
        borrowed = self.forget(loan)
        return tuple(
            torch.zeros_like(weight, dtype=self._gradient_dtype) if total is None else total.detach()
            for weight, total in zip(borrowed.weights, borrowed.sums, strict=True)
        )

    def take_back(self, segment: int, gradients: Tensors) -> None:
        """Add what a borrower has returned to this rank's own gradients: Megatron's main_grad, or grad."""
        for parameter, gradient in zip(self._parameters(segment), gradients, strict=True):
            if not parameter.requires_grad:
                continue
            total = getattr(parameter, "main_grad", parameter.grad)
            if total is None:
                parameter.grad = gradient.clone()
            else:
                add_gradient(total, gradient)

    def assert_empty(self) -> None:
        """Everything that was borrowed has been given back."""
        assert not self._borrowed, f"loans that were not given back: {list(self._borrowed)}"


def _move_gradient(sums: list[Tensor | None], index: int, dtype: torch.dtype, leaf: Tensor) -> None:
    gradient, total = leaf.grad, sums[index]
    assert gradient is not None
    leaf.grad = None
    if total is None:
        sums[index] = gradient.to(dtype)
    else:
        add_gradient(total, gradient)
