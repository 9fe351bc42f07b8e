"""Whole layers with the kernels in them, on a GPU: gradients, and memory by the allocator's own figures."""

import pytest
import torch
from layer_benchmark.layers import Layer
from layer_benchmark.measure import MemoryMeter, prepare
from layer_benchmark.shapes import SHAPES
from megatron.core import parallel_state
from models import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda")


@pytest.fixture(scope="module", autouse=True)
def megatron():
    prepare(CUDA)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def layer(method, dtype, like=None, length=1000, shape="tiny"):
    made = Layer(SHAPES[shape], method, length, CUDA, dtype)
    if like is not None:
        with torch.no_grad():
            for own, other in zip(made.model.parameters(), like.model.parameters(), strict=True):
                own.copy_(other)
            made.hidden.copy_(like.hidden)
            made.grad.copy_(like.grad)
    return made


def gradients(made):
    made.step()
    return {name: p.main_grad.double() for name, p in made.model.named_parameters()}


def test_gradients_are_as_exact_as_without_anything_saved():
    source = layer("none", torch.bfloat16)
    exact = gradients(layer("none", torch.float32, source))
    plain = gradients(source)
    for method in ("ours", "selective", "full"):
        found = gradients(layer(method, torch.bfloat16, source))
        for name, expected in exact.items():
            error = relative_error(found[name], expected)
            assert error <= 2 * relative_error(plain[name], expected) + 1e-3, (method, name, error)


def test_a_layer_keeps_three_units_and_the_log_sum_exp():
    """The attention's output, the input of norm2, and the layer's output; to the allocator's 512 bytes."""
    length, shape = 4096, SHAPES["tiny"]
    made = layer("ours", torch.bfloat16, length=length)
    made.step()
    _, kept = made.step(MemoryMeter(CUDA))
    unit = 2 * length * shape.hidden_size
    expected = 3 * unit + 4 * length * shape.num_heads
    assert expected <= kept <= expected + 16 * 512
    plain = layer("none", torch.bfloat16, length=length)
    plain.step()
    assert plain.step(MemoryMeter(CUDA))[1] > 3 * kept
