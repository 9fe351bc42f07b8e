"""Experts that compute something again: what is kept, how often tokens are routed, what is refused."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from kept import Kept
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from megatron.core.transformer.moe.router import TopKRouter
from models import Case, forget_router_losses
from pretend import pretend_rank
from stages import configured, gpt_stage

from helixpipe.layers.experts import check_parts, check_saving, coupling_of_tokens, unsupported_experts
from helixpipe.layers.module_specs import class_of
from helixpipe.layers.slices import is_sliced
from helixpipe.layers.spec import LOCAL, layer_spec
from helixpipe.plan.cost_model import Recompute

CASE = Case(pp=1, experts=4, style="llama", num_layers=1, seq_length=64)
NO_LOSS = (("moe_aux_loss_coeff", 0.0),)
UNIT = 64 * 32 * 4  # the hidden state
WIDE = 2 * 64 * 40 * 4  # activations of the two experts of every token


def forward_and_backward(levels):
    """Of norm2 and the experts: bytes kept, calls of the router, and what it has counted."""
    case = Case(**{**vars(CASE), "levels": levels})
    with pretend_rank(case):
        torch.manual_seed(5)
        layer = gpt_stage(case).decoder.layers[0]
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        hidden = torch.randn(64, 1, 32, requires_grad=True)
        with mock.patch.object(
            TopKRouter, "routing", autospec=True, side_effect=TopKRouter.routing
        ) as routing:
            output = layer._forward_mlp(hidden)
            kept = Kept(layer, [output]).bytes([hidden])
            output.sum().backward()
        (losses,) = get_moe_layer_wise_logging_tracker().values()
        return kept, routing.call_count, float(losses["values"].sum()), hidden.grad


def test_activations_of_experts_go_and_tokens_are_routed_once():
    kept = {}
    for levels in ("none", "products", "without-attention"):
        kept[levels], calls, loss, gradient = forward_and_backward(levels)
        assert calls == 1
        if levels == "none":
            expected_loss, expected = loss, gradient
        assert loss == pytest.approx(expected_loss)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
        forget_router_losses()
    assert kept["products"] - kept["without-attention"] == 2 * WIDE
    assert kept["none"] - kept["products"] >= UNIT + 3 * WIDE
    # The input, two copies of it, and what routes them.
    assert kept["without-attention"] <= 3 * UNIT + UNIT


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"moe_aux_loss_coeff": 0.1}, "load balancing by aux_loss"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "load balancing by sinkhorn"),
        (
            {"moe_aux_loss_coeff": [0.0, 0.1], "moe_router_load_balancing_type": ["aux_loss"]},
            "load balancing",
        ),
        ({"moe_z_loss_coeff": 0.1}, "a z-loss"),
        ({"moe_expert_capacity_factor": 1.0}, "a capacity of experts"),
    ],
)
def test_what_is_about_a_whole_micro_batch_is_not_computed_by_parts(values, named):
    config = configured(Case(pp=1, experts=4, style="llama", router=NO_LOSS))
    check_parts(config, "a slice")
    for name, value in values.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"a slice routes .* which {named}.* does not allow; leave one out"):
        check_parts(config, "a slice")


@pytest.mark.parametrize("frequency", [1, 2, 3, 5, [0, 1, 1, 0]], ids=str)
def test_the_same_layers_have_experts_as_in_megatron(frequency):
    config = configured(Case(pp=1, experts=4, style="llama"), moe_layer_freq=frequency)
    theirs = get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization="RMSNorm")
    ours = [layer_spec(config, LOCAL, layer=layer) for layer in range(4)]
    found, expected = ([class_of(spec.submodules.mlp) for spec in specs] for specs in (ours, theirs))
    assert found == expected
    # A dense layer's norm has another name in checkpoints than one before experts.
    is_mapped = ["pre_mlp_layernorm." in spec.submodules.sharded_state_dict_keys_map for spec in ours]
    assert is_mapped == [module is MLP for module in expected]


def test_a_dense_model_couples_no_tokens():
    assert coupling_of_tokens(configured(Case(pp=1))) is None
    assert not any(unsupported_experts(configured(Case(pp=1))).values())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"add_bias_linear": True, "expert_tensor_parallel_size": 2}, "biases of experts that ranks share"),
        ({"context_parallel_size": 2}, "context parallelism, whose ranks route their own tokens"),
        (
            {"moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"]},
            "load balancing over a whole batch",
        ),
        ({"moe_shared_expert_overlap": True}, "shared experts beside communication"),
        ({"moe_latent_size": 8}, "latent experts"),
        ({"moe_input_jitter_eps": 0.1}, "random noise for routers"),
        ({"moe_router_force_load_balancing": True}, "random noise for routers"),
    ],
)
def test_what_no_schedule_supports_has_a_name(values, named):
    config = configured(CASE)
    assert not any(unsupported_experts(config).values())
    for name, value in values.items():
        setattr(config, name, value)
    (found,) = (name for name, is_set in unsupported_experts(config).items() if is_set)
    assert found.startswith(named)


def test_experts_in_one_product_need_the_engine():
    with pretend_rank(CASE), pytest.raises(ValueError, match="--moe-grouped-gemm needs Transformer Engine"):
        gpt_stage(CASE, moe_grouped_gemm=True)


def test_experts_in_one_product_are_not_computed_again():
    with pretend_rank(CASE):
        layer = gpt_stage(CASE).decoder.layers[0]
        layer.mlp.experts = torch.nn.Identity()
        check_saving(layer.mlp, layer.config, Recompute.NONE, None)
        with pytest.raises(ValueError, match="must run one by one; leave --moe-grouped-gemm out"):
            check_saving(layer.mlp, layer.config, Recompute.PRODUCTS, None)


def test_all_linear_layers_of_experts_that_run_in_slices_are_marked():
    """Or Megatron adds their weights' gradients once more by itself."""
    with pretend_rank(CASE):
        values = {"moe_shared_expert_intermediate_size": 48, "moe_aux_loss_coeff": 0.0}
        mlp = gpt_stage(CASE, **values).decoder.layers[0].mlp
        check_saving(mlp, mlp.config, Recompute.NONE, 16)
        linears = [m for m in mlp.modules() if isinstance(m, (ColumnParallelLinear, RowParallelLinear))]
        assert len(linears) == 2 * (CASE.experts + 1)
        assert all(map(is_sliced, linears))
