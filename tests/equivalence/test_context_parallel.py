"""Sequences that ranks share, against Megatron's 1F1B over whole ones: losses and every gradient."""

from dataclasses import replace

import pytest
import torch
from context_worker import compare_with_whole_sequences
from models import Case
from ranks import run_on_ranks

# Norm of the difference over the norm, of the losses, which Megatron computes in fp32, and of each gradient
# tensor. Sums are in another order.
LOSS_TOLERANCE = 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

TWO = Case(pp=1, cp=2, style="llama", unmasked=True, num_layers=2, dtype=torch.float64)
FOUR = Case(pp=2, cp=2, unmasked=True)


def check(cases):
    for found in run_on_ranks(cases[0].world_size, compare_with_whole_sequences, cases):
        for case, errors in zip(cases, found, strict=True):
            for name, (of_losses, of_gradients) in errors.items():
                assert of_losses < LOSS_TOLERANCE, f"{case} by {name}"
                assert of_gradients < TOLERANCE[case.dtype], f"{case} by {name}"


def test_two_ranks_share_a_sequence():
    check([replace(TWO, schedule="1f1b"), replace(TWO, without_attention=True, attention_range="block")])


@pytest.mark.slow
def test_tokens_of_shared_sequences_find_their_experts():
    case = replace(TWO, experts=4, router=(("moe_aux_loss_coeff", 0.0),))
    check([replace(case, schedule="1f1b"), replace(case, ep=2, schedule="1f1b"),
           replace(case, ep=2, without_attention=True, attention_range="block")])  # fmt: skip
    case = replace(case, pp=2, num_layers=4)
    check([replace(case, ep=2, attention_range="qkv", head_placement="spread"),
           replace(case, schedule="zb-h1", mlp_chunk=7)])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("style", ["gpt", "llama"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_stages_of_shared_sequences(style, dtype):
    case = replace(FOUR, style=style, dtype=dtype, schedule="1f1b")
    check([case, replace(case, per_token_loss=True, unmasked=False), replace(case, schedule="zb-h1"),
           replace(case, schedule="gpipe", micro_batch_size=2, overlap=True)])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("style", ["gpt", "llama"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_segments_of_shared_sequences(style, dtype):
    case = replace(FOUR, style=style, dtype=dtype)
    check([case, replace(case, attention_range="qkv", per_token_loss=True, unmasked=False),
           replace(case, attention_range="block", head_placement="spread", without_attention=True),
           replace(case, attention_range="block", overlap=True, loss_chunk=5, mlp_chunk=7)])  # fmt: skip


@pytest.mark.slow
def test_with_tensor_parallelism_and_replicas():
    case = Case(pp=1, tp=2, cp=2, unmasked=True, sequence_parallel=True, style="llama", schedule="1f1b")
    check([case, replace(case, schedule="helix", attention_range="block")])
    check([Case(pp=1, cp=2, dp=2, same_data=True, unmasked=True, overlap=True, schedule="1f1b")])
