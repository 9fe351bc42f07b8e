"""The norms that Megatron's specs are filled with."""

import models
import pytest
import torch

from helixpipe.layers.norm import TorchNorm


def config(**values):
    made = models.make_config(models.Case(pp=1))
    for name, value in values.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_values_by_definition(kind, eps):
    norm = TorchNorm(config(normalization=kind, params_dtype=torch.float64), hidden_size=7, eps=eps)
    x = torch.randn(3, 2, 7, dtype=torch.float64)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter += torch.rand_like(parameter)
    if kind == "LayerNorm":
        centred = x - x.mean(-1, keepdim=True)
        expected = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias
    else:
        expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_have_the_models_type(dtype):
    norm = TorchNorm(config(params_dtype=dtype), hidden_size=4)
    assert {name: parameter.dtype for name, parameter in norm.named_parameters()} == {
        "weight": dtype,
        "bias": dtype,
    }


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_gradients_are_marked_for_reduction_under_sequence_parallelism(kind, sequence_parallel):
    norm = TorchNorm(config(normalization=kind, sequence_parallel=sequence_parallel), hidden_size=4)
    marks = [parameter.sequence_parallel for parameter in norm.parameters()]
    assert marks == [sequence_parallel] * len(marks)
    assert marks


def test_arguments_of_other_norm_classes_are_accepted():
    assert isinstance(
        TorchNorm(config(), hidden_size=4, persist_layer_norm=True, zero_centered_gamma=False),
        torch.nn.LayerNorm,
    )


def test_unknown_norms_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'L2Norm'; choose one of LayerNorm, RMSNorm"):
        TorchNorm(config(normalization="L2Norm"), hidden_size=4)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_zero_centered_norms_multiply_by_one_more_than_their_weight(kind):
    centered = TorchNorm(config(normalization=kind, layernorm_zero_centered_gamma=True), hidden_size=8)
    assert all(not parameter.any() for parameter in centered.parameters())
    plain = TorchNorm(config(normalization=kind), hidden_size=8)
    weight, given = torch.randn(8), torch.randn(3, 2, 8)
    centered.weight.data, plain.weight.data = weight, weight + 1
    assert torch.equal(centered(given), plain(given))
