"""Mixtures of experts under plans against Megatron's own functions: every loss, and every gradient.

Those of routers with them, to which the losses that balance experts go. Experts are more than a token has, so
that routing decides what they learn.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from equivalence_worker import compare_one_iteration
from models import Case
from ranks import run_on_ranks

# Each gradient tensor: norm of the difference over its norm.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
UNBALANCED = (("moe_aux_loss_coeff", 0.0),)
BY_SEQUENCE = (("moe_router_load_balancing_type", "seq_aux_loss"), ("moe_z_loss_coeff", 0.01))
BY_ASSIGNMENT = (("moe_router_load_balancing_type", "sinkhorn"), *UNBALANCED)
DROPPING = (("moe_expert_capacity_factor", 1.2), ("moe_token_dispatcher_type", "allgather"))
SIGMOID = (
    ("moe_router_score_function", "sigmoid"),
    ("moe_router_topk", 3),
    ("moe_router_topk_scaling_factor", 2.0),
)
# Ranks of helix with two or four stages have experts in all of their layers or in none.
SOME_LAYERS = (("moe_layer_freq", (0, 1, 0, 1)),)
EVERY_TOKENS = (("moe_shared_expert_intermediate_size", 48),)
SHORT = Case(pp=2, experts=4, style="llama")
SHARED = Case(pp=2, tp=2, sequence_parallel=True, experts=4, style="llama")
PAIRS = Case(pp=2, dp=2, ep=2, experts=4, style="llama")


# With biases, clamped gates and sinks.
BIASED = replace(SHORT, style="oss", attention_range="qkv")


def whole_sequences(layout: Case) -> list[Case]:
    """Helix, stages and whatever they do to keep less: the losses that balance experts are there."""
    fp64 = replace(layout, dtype=torch.float64)
    return [
        # One rank computes all losses of tokens; the others have routers, too.
        replace(layout, attention_range="qkv", without_attention=True),
        replace(layout, schedule="zb-h1", without_attention=True, overlap=True, router=EVERY_TOKENS),
        replace(layout, head_placement="spread"),
        replace(layout, per_token_loss=True, micro_batch_size=2, router=BY_SEQUENCE),
        replace(fp64, attention_range="block", levels="products", rounds=2),
        replace(layout, split="all", overlap=True, router=BY_ASSIGNMENT),
        replace(
            fp64,
            interlocked=True,
            rounds=2,
            fold=1,
            split="planned",
            attention_range="block",
            levels="products",
        ),
        replace(layout, without_attention=True, router=DROPPING),
        replace(layout, levels="products:2,without-attention:2", router=SIGMOID),
        replace(
            fp64, attention_range="block", levels="products", head_placement="spread", router=EVERY_TOKENS
        ),
        replace(fp64, schedule="zb-v", tied=False, num_layers=8),
        replace(layout, schedule="gpipe", recompute="full"),
    ]


def parts_of_sequences(layout: Case) -> list[Case]:
    """Whose tokens are routed by themselves."""
    layout = replace(layout, router=UNBALANCED)
    fp64 = replace(layout, dtype=torch.float64)
    return [
        replace(layout, schedule="sliced-helix", without_attention=True),
        replace(fp64, attention_range="block", head_placement="spread", mlp_chunk=7, loss_chunk=10),
        replace(fp64, schedule="seq1f1b", num_slices=3, router=(*UNBALANCED, *EVERY_TOKENS)),
        replace(fp64, schedule="sliced-helix", mlp_chunk=5, router=(*UNBALANCED, *EVERY_TOKENS)),
        replace(fp64, schedule="sliced-helix", attention_range="block", head_placement="spread", mlp_chunk=5),
    ]


def check(cases: list[Case]) -> None:
    """Hold every case against Megatron."""
    ranks = run_on_ranks(cases[0].world_size, compare_one_iteration, cases)
    for number, case in enumerate(cases):
        result, limit = ranks[0][number], TOLERANCE[case.dtype]
        assert result["missing"] == [], case
        losses, expected = (torch.tensor(result[name]) for name in ("losses", "reference_losses"))
        torch.testing.assert_close(losses, expected, rtol=limit, atol=0.0, msg=str(case))
        worst = max(result["errors"], key=lambda name: result["errors"][name])
        assert result["errors"][worst] <= limit, (case, worst)
        assert any("router" in name for name in result["errors"])
        # No gradient is compared with nothing: every expert has got tokens.
        assert result["smallest_norm"] > 1e-4, case
        assert result["deferred"] > 0 or not case.has_weight_gradients
        assert all(rank[number]["trace_is_plan"] for rank in ranks)


def test_experts_learn_what_they_do_under_megatron():
    cases = [*whole_sequences(SHORT)[:2], parts_of_sequences(SHORT)[0], replace(BIASED, levels="products")]
    check([*cases, replace(SHORT, attention_range="block", levels="products", router=SOME_LAYERS)])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Case(pp=1, experts=4, style="llama"), SHORT, SHARED, PAIRS], ids=str)
def test_experts_learn_so_under_every_schedule(layout):
    check(whole_sequences(layout))
    check(parts_of_sequences(layout))


@pytest.mark.slow
@pytest.mark.parametrize("frequency", [None, 3], ids=("second", "third"))
@pytest.mark.parametrize("layout", [SHORT, replace(SHORT, pp=4), SHARED, PAIRS], ids=str)
def test_experts_in_some_layers_learn_so_under_every_schedule(layout, frequency):
    """In every second layer, beginning with the second, or in every third, beginning with the first."""

    def some(case: Case) -> Case:
        layers = frequency or (0, 1) * (case.num_layers // 2)
        return replace(case, router=(*case.router, ("moe_layer_freq", layers)))

    check(list(map(some, whole_sequences(layout))))
    check(list(map(some, parts_of_sequences(layout))))


@pytest.mark.slow
def test_experts_with_biases_learn_so():
    fp64 = replace(BIASED, dtype=torch.float64)
    cases = [
        replace(fp64, attention_range="block", head_placement="spread", without_attention=True),
        replace(fp64, split="all", overlap=True, router=DROPPING),
        replace(BIASED, schedule="zb-h1", without_attention=True),
        replace(BIASED, schedule="zb-v", tied=False),
        replace(BIASED, schedule="seq1f1b", num_slices=3, fold=1, router=UNBALANCED),
        replace(BIASED, mlp_chunk=7, router=UNBALANCED),
        replace(BIASED, schedule="gpipe", recompute="full"),
    ]
    check(cases)
    check([replace(case, dp=2, ep=2) for case in cases])
