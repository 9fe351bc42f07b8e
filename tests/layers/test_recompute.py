"""Taking data away from saved tensors, and putting it back in time."""

import gc
import weakref
from collections import Counter

import pytest
import torch

from helixpipe.layers.recompute import recompute


@pytest.fixture
def linear():
    torch.manual_seed(1)
    return torch.nn.Linear(5, 7, dtype=torch.float64)


@pytest.fixture
def x():
    return torch.randn(11, 5, dtype=torch.float64, requires_grad=True)


def gradients(result, *tensors):
    return torch.autograd.grad((result * torch.linspace(1, 2, result.numel()).view_as(result)).sum(), tensors)


def test_the_producer_runs_twice_and_the_consumer_once(linear, x):
    calls, produced = Counter(), []

    def produce(x):
        calls["produce"] += 1
        produced.append(torch.tanh(x))
        return (produced[-1] * 2,)

    def consume(y):
        calls["consume"] += 1
        return (linear(y),)

    (result,) = recompute(produce, consume, x)
    expected = linear(torch.tanh(x) * 2)
    assert torch.equal(result, expected)
    assert calls == {"produce": 1, "consume": 1}
    weights = (result * result).sum()
    weights.backward()
    found = [x.grad, linear.weight.grad, linear.bias.grad]
    wanted = torch.autograd.grad((expected * expected).sum(), (x, linear.weight, linear.bias))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert calls == {"produce": 2, "consume": 1}


def test_the_data_is_gone_until_the_backward_pass(linear, x):
    seen = []
    (result,) = recompute(lambda x: (x.exp(),), lambda y: (seen.append(y) or linear(y),), x)
    assert seen[0].untyped_storage().nbytes() == 0
    assert seen[0].shape == (11, 5)
    result.sum().backward()
    assert torch.equal(seen[0], x.exp())


def test_views_of_one_storage_come_back_together(x):
    def produce(x):
        left, right = (x * 3).split([2, 3], dim=1)
        return left, right, right.exp()

    def consume(left, right, other):
        return left.square().sum(dim=1) * other.square().sum(dim=1), right.square()

    results = recompute(produce, consume, x)
    (found,) = torch.autograd.grad(sum(result.sum() for result in results), x)
    expected = sum(result.sum() for result in consume(*produce(x)))
    torch.testing.assert_close(found, torch.autograd.grad(expected, x)[0], rtol=1e-14, atol=0)


def test_one_consumed_tensor_is_enough(linear, x):
    results = recompute(lambda x: (x.exp(),), lambda y: (linear(y), y.square()), x)
    (found,) = gradients(results[1], x)
    torch.testing.assert_close(found, gradients(x.exp().square(), x)[0], rtol=1e-14, atol=0)


def test_an_identity_takes_nothing_away(linear, x):
    """A norm that is fused into the next layer leaves an identity in its place."""
    hidden = x * 1
    (result,) = recompute(lambda x: (x,), lambda y: (linear(y),), hidden)
    assert torch.equal(hidden, x)
    assert torch.equal(gradients(result, x)[0], gradients(linear(x), x)[0])


def test_a_result_that_is_the_product_itself_stays(x):
    (result,) = recompute(lambda x: (x.exp(),), lambda y: (y.view(-1),), x)
    assert torch.equal(result, x.exp().view(-1))
    assert torch.equal(gradients(result, x)[0], gradients(x.exp().view(-1), x)[0])


@pytest.mark.parametrize("differentiate", [False, True])
def test_without_a_gradient_to_compute_nothing_is_taken_away(linear, x, differentiate):
    seen = []
    x = x.detach().requires_grad_(not differentiate)
    with torch.set_grad_enabled(differentiate):
        recompute(lambda x: (x.exp(),), lambda y: (seen.append(y) or linear(y),), x)
    assert torch.equal(seen[0], x.exp())


def test_no_cycle_keeps_a_graph_that_is_dropped(linear, x):
    class Producer:
        def __call__(self, x):
            return (x.exp(),)

    producer = Producer()
    alive = weakref.ref(producer)
    gc.disable()
    try:
        result = recompute(producer, lambda y: (linear(y),), x)
        del producer
        assert alive() is not None
        del result
        assert alive() is None
    finally:
        gc.enable()


def test_changing_the_input_in_place_is_noticed(linear, x):
    hidden = x * 1
    (result,) = recompute(lambda x: (x.exp(),), lambda y: (linear(y),), hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()
