"""Losses of sequences whose tokens' losses come slice by slice, on one rank or on several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from helixpipe.elastic.chunks import Piece
from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.megatron_adapter.forward_step import IterationInput, IterationResult
from helixpipe.plan.plan import Plan

_LossFunction: TypeAlias = Callable[..., Any] | None


class SequenceLosses:
    """Applies a loss function, which wants all tokens' losses of a sequence, though slices end one by one.

    The backward pass of a slice begins before the next slice has a loss. So the function is called twice:
    with zeros, for the weight of each token's loss in the sum that it makes, and at the end with the losses
    themselves, on the rank of the sequence's last slice. A function that makes something else than a
    weighted sum is refused in the first iteration.

    Args:
        plan: of slices.
        rank: this pipeline rank.
        segmented: the model, for Megatron's bookkeeping.
        shape: micro batch size and sequence length.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        segmented: SegmentedGPTModel,
        shape: tuple[int, int],
    ) -> None:
        self._segmented = segmented
        self._shape = shape
        self._num_sequences = plan.num_sequences
        self._are_on_several_ranks = len(set(plan.placement[-1])) > 1
        self._reported = plan.reported_by(rank)
        self._is_checked = False
        self._input: IterationInput | None = None
        self._functions: dict[int, _LossFunction] = {}
        self._weights: dict[int, Tensor] = {}
        self._found: dict[Piece, Tensor] = {}

    def begin(self, iteration: IterationInput) -> None:
        """Take over an iteration's input."""
        self._input = iteration
        self._functions.clear()
        self._weights.clear()
        self._found.clear()

    def share(self, piece: Piece, losses: Tensor, function: _LossFunction) -> Tensor:
        """A scalar whose backward pass is that of the sequence's loss to this slice's tokens.

        Args:
            piece: the slice.
            losses: of its tokens, [b, T] in fp32.
            function: the sequence's loss function.
        """
        assert self._input is not None
        self._functions[piece.sequence] = function
        self._found[piece] = losses.detach()
        if not self._input.differentiate:
            return losses.new_zeros(())
        if piece.sequence not in self._weights:
            none = torch.zeros(self._shape, dtype=losses.dtype, device=losses.device)
            self._weights[piece.sequence] = self._differentiate(none, function, IterationResult())[1]
        weights = self._weights[piece.sequence][:, piece.start : piece.start + piece.length]
        share = (losses * weights).sum()
        # One for a finite loss, else NaN: a loss that is not finite must not have finite gradients.
        return share * (1 + 0 * share.detach())

    def finish(self, result: IterationResult) -> None:
        """Give the losses of whole sequences to their loss functions; collective for those on several ranks.

        Raises:
            ValueError: a loss function is no weighted sum of tokens' losses.
        """
        assert self._input is not None
        whole = self._gathered()
        for sequence in self._reported:
            function, losses = self._functions[sequence], whole[sequence]
            if not self._input.differentiate:
                self._input.loss(losses, function, self._segmented, self._segmented.config, result)
                continue
            loss, weights = self._differentiate(losses, function, result)
            if not self._is_checked and bool(loss.isfinite()):
                self._check(weights, self._weights[sequence])
        self._is_checked = self._input.differentiate or self._is_checked
        self._functions.clear()
        self._weights.clear()
        self._found.clear()

    def _differentiate(
        self, losses: Tensor, function: _LossFunction, result: IterationResult
    ) -> tuple[Tensor, Tensor]:
        """The loss of tokens' losses [b, s], and its gradient with respect to these."""
        assert self._input is not None
        losses = losses.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._input.loss(losses, function, self._segmented, self._segmented.config, result)
            (gradient,) = torch.autograd.grad(loss, losses, allow_unused=True)
        return loss.detach(), torch.zeros_like(losses) if gradient is None else gradient

    def _gathered(self) -> Tensor:
        """The losses of all tokens, [sequences, b, s], where a loss function is to be called."""
        group = parallel_state.get_pipeline_model_parallel_group()
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        whole = torch.zeros(self._num_sequences, *self._shape, device=device)
        for piece, losses in self._found.items():
            whole[piece.sequence, :, piece.start : piece.start + piece.length] = losses
        if self._are_on_several_ranks:
            # Each token's loss is on one rank, and zero on the others: the sum is exact.
            travelling = whole if dist.get_backend(group) == "nccl" else whole.cpu()
            dist.all_reduce(travelling, group=group)
            whole = travelling.to(device)
        return whole

    @staticmethod
    def _check(found: Tensor, used: Tensor) -> None:
        if not torch.allclose(found, used, rtol=1e-5, atol=0.0):
            raise ValueError(
                "the loss function is not a weighted sum of the tokens' losses, which slices of sequences "
                "need under this schedule; use another loss or a schedule of whole sequences"
            )
