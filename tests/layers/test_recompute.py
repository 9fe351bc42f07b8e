"""Taking data away from saved tensors, and putting it back in time."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

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
    (result,) = recompute(lambda x: (x.exp(),), lambda y: (seen.append(weakref.ref(y)) or linear(y),), x)
    assert seen[0]() is None
    result.sum().backward()
    assert torch.equal(linear.weight.grad, torch.ones(7, 11, dtype=x.dtype) @ x.exp())


class Storing(torch.autograd.Function):
    """Saves a view of what it is given, and notes where it lies in its backward pass."""

    @staticmethod
    def forward(ctx, y, notes):
        ctx.save_for_backward(y.t())
        ctx.notes = notes
        return y.sum(dim=1)

    @staticmethod
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        ctx.notes.append((saved.data_ptr(), saved.shape, saved.clone()))
        return grad[:, None].expand(saved.t().shape), None


def test_what_is_computed_again_is_not_copied(x):
    """Storages are neither emptied nor filled: on a GPU that would allocate twice, and copy."""
    produced, notes = [], []

    def produce(x):
        result = x.exp()
        produced.append(result.data_ptr())
        return (result,)

    (result,) = recompute(produce, lambda y: (Storing.apply(y, notes),), x)
    result.sum().backward()
    ((address, shape, saved),) = notes
    assert address == produced[1]
    assert shape == (5, 11)
    assert torch.equal(saved, x.exp().t())


def test_what_is_put_back_ends_with_the_consumers_backward_pass(linear, x):
    """Before the producer's, which may have a long way to go, and though the result is still held."""
    alive = []

    class Producer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            result = x.exp()
            alive.append(weakref.ref(result.untyped_storage()))
            ctx.save_for_backward(x)
            return result

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            alive.append([reference() for reference in alive])
            return grad * x.exp()

    (result,) = recompute(lambda x: (Producer.apply(x),), lambda y: (linear(y),), x)
    result.sum().backward()
    assert alive[2] == [None, None]


def test_leaves_stay_themselves_in_the_consumers_graph(x):
    """Megatron's linear layers look for ``main_grad`` at the weight that they have saved."""
    weight = torch.nn.Parameter(torch.randn(7, 5, dtype=x.dtype))
    found = []

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, weight):
            ctx.save_for_backward(y, weight)
            return y @ weight.t()

        @staticmethod
        def backward(ctx, grad):
            y, weight = ctx.saved_tensors
            found.append(weight)
            return grad @ weight, grad.t() @ y

    (result,) = recompute(lambda x: (x.exp(),), lambda y: (Linear.apply(y, weight),), x)
    result.sum().backward()
    assert found[0] is weight
    torch.testing.assert_close(weight.grad, torch.ones(7, 11, dtype=x.dtype) @ x.exp(), rtol=1e-14, atol=0)


def test_hooks_of_others_keep_what_they_have_taken(linear, x):
    with saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        (result,) = recompute(lambda x: (x.exp(),), lambda y: (linear(y),), x)
    found = gradients(result, x, linear.weight)
    for pair in zip(found, gradients(linear(x.exp()), x, linear.weight), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-14, atol=0)


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


def test_several_inputs_of_which_one_has_no_gradient(linear, x):
    scale, shift = (torch.randn(11, 1, dtype=x.dtype, requires_grad=wanted) for wanted in (True, False))
    (result,) = recompute(lambda x, a, b: (x.exp() * a + b,), lambda y: (linear(y),), x, scale, shift)
    expected = linear(x.exp() * scale + shift)
    assert torch.equal(result, expected)
    wanted = gradients(expected, x, scale, linear.weight)
    assert all(
        torch.equal(*pair) for pair in zip(gradients(result, x, scale, linear.weight), wanted, strict=True)
    )
    assert shift.grad is None
