"""Rotary positions: Megatron's values and gradients, and nothing kept."""

import pytest
import torch
from kept import Kept
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from models import Case
from pretend import pretend_rank
from stages import configured

from helixpipe.layers.rotary import rotate


@pytest.fixture
def group():
    with pretend_rank(Case(pp=1)):
        yield parallel_state.get_context_parallel_group()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_megatrons_bits(group, interleaved, rotated, dtype):
    config = configured(Case(pp=1, style="llama"), rotary_interleaved=interleaved)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(127, 2, 4, 8, generator=generator).to(dtype).requires_grad_()
    half = torch.rand(127, 1, 1, rotated // 2, generator=generator) * 100
    angles = half.repeat_interleave(2, dim=-1) if interleaved else torch.cat([half, half], dim=-1)
    found = rotate(query, angles, config, group)
    assert Kept(torch.nn.Module(), [found]).bytes() == 0
    expected = apply_rotary_pos_emb(query, angles, config=config, cp_group=group)
    assert torch.equal(found, expected)
    grad = torch.randn(found.shape, generator=generator).to(dtype)
    (of_found,) = torch.autograd.grad(found, query, grad)
    (of_expected,) = torch.autograd.grad(expected, query, grad)
    assert torch.equal(of_found, of_expected)
