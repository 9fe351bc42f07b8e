"""Loss functions of whole sequences whose tokens' losses come slice by slice."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from helixpipe.megatron_adapter.forward_step import IterationResult
from helixpipe.megatron_adapter.segments import sequence_losses
from helixpipe.megatron_adapter.segments.sequence_losses import SequenceLosses
from helixpipe.megatron_adapter.segments.slices import pieces_of
from helixpipe.plan import ScheduleRequest, build_plan

ENDS = (4, 6, 7)
LOSSES = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
MASK = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]])


class OneIteration:
    """Stands for Megatron's bookkeeping."""

    def __init__(self, *, differentiate=True):
        self.differentiate = differentiate
        self.reported = []

    def loss(self, losses, function, model, config, result):
        loss = function(losses)
        result.loss_data.append(loss.item())
        return loss


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    monkeypatch.setattr(sequence_losses, "parallel_state", mock.Mock())


def slices_of(function, losses=LOSSES, *, differentiate=True):
    """Gradients of the tokens' losses slice by slice, and what was reported."""
    plan = build_plan(
        "sliced-helix", ScheduleRequest(num_layers=1, num_ranks=1, num_microbatches=1, num_fold=3)
    )
    pieces = pieces_of(plan, ENDS)
    found = SequenceLosses(plan, 0, SimpleNamespace(config=None), (1, 7))
    gradients = []
    for _ in range(2):
        found.begin(OneIteration(differentiate=differentiate))
        gradients.clear()
        for piece in pieces:
            own = losses[:, piece.start : piece.start + piece.length].clone().requires_grad_(differentiate)
            share = found.share(piece, own, function)
            if differentiate:
                share.backward()
                gradients.append(own.grad)
        result = IterationResult()
        found.finish(result)
    return torch.cat(gradients, dim=1) if differentiate else None, result.loss_data


def masked_mean(losses):
    return (losses * MASK).sum() / MASK.sum()


def test_gradients_and_report_are_those_of_the_whole_sequence():
    gradients, reported = slices_of(masked_mean)
    torch.testing.assert_close(gradients, MASK / MASK.sum())
    assert reported == [masked_mean(LOSSES).item()]
    assert slices_of(masked_mean, differentiate=False) == (None, reported)


def test_a_loss_that_is_no_weighted_sum_is_refused():
    with pytest.raises(ValueError, match="not a weighted sum of the tokens' losses"):
        slices_of(lambda losses: (losses**2).mean())
    gradients, _ = slices_of(lambda losses: torch.tensor(3.0, requires_grad=True) * 1)
    assert not gradients.any(), "a loss of nothing has no gradients"


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_makes_its_gradients_so(wrong):
    losses = LOSSES.clone()
    losses[0, 4] = wrong
    gradients, (reported,) = slices_of(masked_mean, losses)
    assert gradients[0, 4:6].isnan().all()
    assert not torch.tensor(reported).isfinite()
