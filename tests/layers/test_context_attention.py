"""Attention over sequences that ranks share: against explicit scores, and Megatron's shares of a sequence."""

import pytest
import torch
from context_worker import attention_errors, own_tokens
from ranks import run_on_ranks


def test_a_rank_has_the_tokens_that_megatron_gives_it():
    for ours, theirs in run_on_ranks(2, own_tokens, 12):
        assert ours == theirs
    assert ours[0] == [3, 4, 5, 6, 7, 8]


# Rounding of the type, over sums of some hundred products.
@pytest.mark.parametrize(("size", "dtype", "most"), [(2, torch.float32, 1e-6), (3, torch.float64, 1e-14)])
def test_output_and_gradients_are_those_of_the_whole_sequence(size, dtype, most):
    shapes = [(12, 4, 2, 8), (12 * 61, 2, 2, 16), (2 * size, 3, 1, 8)]
    for errors in run_on_ranks(size, attention_errors, shapes, dtype):
        assert max(map(max, errors)) < most
