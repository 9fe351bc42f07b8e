"""Functions over slices of the sequence: values, gradients, and what reaches a parameter's hooks."""

from collections import Counter

import pytest
import torch
from kept import LargestTensor

from helixpipe.layers.slices import SlicedFunction, in_slices
from helixpipe.plan.chunk_size import automatic_size

LENGTH, WIDTH, INNER = 127, 6, 40


@pytest.fixture
def parts():
    torch.manual_seed(2)
    first = torch.nn.Linear(WIDTH, INNER, dtype=torch.float64)
    second = torch.nn.Linear(INNER, WIDTH, dtype=torch.float64)
    x = torch.randn(LENGTH, 2, WIDTH, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(LENGTH, 2, 1, dtype=torch.float64)
    return first, second, x, scale


def function_of(first, second, size):
    def run(x, scale):
        return second(torch.tanh(first(x))) * scale

    return SlicedFunction(run, run, (*first.parameters(), *second.parameters()), size)


@pytest.mark.parametrize("size", [1, 7, 64, 126, 127, 1000])
def test_values_and_gradients_are_those_of_the_whole(parts, size):
    first, second, x, scale = parts
    function = function_of(first, second, size)
    result = in_slices(function, x, scale)
    expected = function.forward(x, scale)
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-15)
    wanted = (x, *function.parameters)
    weights = torch.rand_like(expected)
    for found, exact in zip(
        torch.autograd.grad((result * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-13)


def test_nothing_in_between_is_as_long_as_the_sequence(parts):
    first, second, x, scale = parts
    with LargestTensor() as largest:
        in_slices(function_of(first, second, 16), x, scale).sum().backward()
    # 16 positions between the two layers are less than the whole input.
    assert x.numel() > 16 * 2 * INNER
    assert largest.bytes == 8 * x.numel()
    with LargestTensor() as largest:
        function_of(first, second, 16).forward(x, scale)
    assert largest.bytes == 8 * LENGTH * 2 * INNER


def test_a_parameter_accumulates_once(parts):
    first, second, x, scale = parts
    fired = Counter()
    function = function_of(first, second, 16)
    for number, parameter in enumerate(function.parameters):
        parameter.register_post_accumulate_grad_hook(lambda _, number=number: fired.update([number]))
    in_slices(function, x, scale).sum().backward()
    assert fired == dict.fromkeys(range(4), 1)


def test_a_frozen_parameter_gets_nothing(parts):
    first, second, x, scale = parts
    first.weight.requires_grad_(False)
    in_slices(function_of(first, second, 16), x, scale).sum().backward()
    assert first.weight.grad is None
    assert second.weight.grad is not None


def test_gradients_are_summed_in_main_grad_where_there_is_one(parts):
    """Megatron's protocol: whoever has added to ``main_grad`` says so, and hands on zeros."""
    first, second, x, scale = parts
    function = function_of(first, second, 16)
    expected = torch.autograd.grad(function.forward(x, scale).sum(), function.parameters)
    for parameter in function.parameters:
        parameter.main_grad = torch.ones_like(parameter)
        parameter.grad_added_to_main_grad = False
    for _ in range(2):
        in_slices(function, x, scale).sum().backward()
    for parameter, gradient in zip(function.parameters, expected, strict=True):
        assert parameter.grad_added_to_main_grad
        assert not parameter.grad.any()
        torch.testing.assert_close(parameter.main_grad, 1 + 2 * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("main_grad", [None, torch.bfloat16])
def test_low_precision_is_summed_in_fp32(main_grad):
    """In bf16, one is lost when it is added to 256."""
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    if main_grad is not None:
        weight.main_grad = torch.zeros((), dtype=main_grad)
    x = torch.ones(1024, dtype=torch.bfloat16, requires_grad=True)
    function = SlicedFunction(lambda x: x * weight, lambda x: x * weight, (weight,), 1)
    in_slices(function, x).sum().backward()
    assert weight.grad == 1024


@pytest.mark.parametrize(
    ("tokens", "width", "hidden", "size"),
    [
        (131072, 16384, 4096, 32768),
        (131072, 16384 // 8, 4096 // 8, 32768),
        (131072, 3 * 128256 // 8, 512, 1395),
        (131072, 3 * 128256, 4096, 1395),
        (8192, 3 * 128256, 4096, 1024),
        (512, 16384, 4096, 512),
        (4096, 1024, 4096, 4096),
    ],
)
def test_automatic_sizes(tokens, width, hidden, size):
    assert automatic_size(tokens, width, hidden) == size
