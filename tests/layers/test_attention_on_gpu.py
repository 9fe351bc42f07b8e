"""The attention backends that work on this GPU, by their real libraries, against float64."""

from __future__ import annotations

import exact_attention
import pytest
import torch
from test_attention_backends import BOUNDS, CONTEXT, HEADS, LENGTH, ROUNDING, SCALE, problem

from helixpipe.layers.attention.choice import BACKENDS, choose, problem_with
from helixpipe.layers.attention.interface import AttentionBackend, ForwardResult, Spans

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Kernels also round the probabilities.
TOLERANCE = {dtype: 2.5 * rounding for dtype, rounding in ROUNDING.items()}
# A device's exponential function is not the one of float64: an error of 6e-5 was seen.
SUM_TOLERANCE = 1e-3
every_backend = pytest.mark.parametrize(
    "name", [name for name, backend in BACKENDS.items() if backend.on_gpu]
)


def on_gpu(name, tensors) -> tuple[AttentionBackend, list[torch.Tensor]]:
    """The backend, and copies of tensors with their strides; skips what does not work here."""
    moved = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t) for t in tensors]
    try:
        return choose(name, problem_with(moved[0], moved[1])).backend, moved
    except ValueError as error:
        pytest.skip(str(error))


def assert_exact(found, expected, dtype):
    """Norms of the differences as 16 bits allow."""
    output, log_sum_exp, *gradients = (tensor.cpu() for tensor in found)
    assert log_sum_exp.dtype is torch.float32
    torch.testing.assert_close(log_sum_exp.double(), expected[1], rtol=SUM_TOLERANCE, atol=SUM_TOLERANCE)
    for tensor, wanted in zip((output, *gradients), (expected[0], *expected[2:]), strict=True):
        assert (tensor.dtype, tensor.shape) == (dtype, wanted.shape)
        assert float((tensor.double() - wanted).norm()) <= TOLERANCE[dtype] * float(wanted.norm())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "context"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@every_backend
def test_output_log_sum_exp_and_gradients(name, heads, causal):
    given = problem(*heads, keys=LENGTH if causal else CONTEXT)
    backend, (query, key, value, grad) = on_gpu(name, given)
    result = backend.forward(query, key, value, SCALE, causal=causal)
    found = (*result[:2], *backend.backward(grad, query, key, value, result, SCALE, causal=causal))
    query, key, value, grad = given
    expected = exact_attention.forward(query, key, value, SCALE, causal)
    expected += exact_attention.backward(grad, query, key, value, *expected, SCALE, causal)
    assert_exact(found, expected, torch.bfloat16)


@every_backend
def test_packed_sequences(name):
    given = problem(8, 2, 64, dtype=torch.float16, batch=1)
    backend, (query, key, value, grad) = on_gpu(name, given)
    spans = Spans(BOUNDS)
    result = backend.forward(query, key, value, SCALE, spans=spans)
    found = (*result[:2], *backend.backward(grad, query, key, value, result, SCALE, spans=spans))
    query, key, value, grad = given
    expected = exact_attention.forward_packed(query, key, value, SCALE, BOUNDS)
    expected += exact_attention.backward_packed(grad, query, key, value, *expected, SCALE, BOUNDS)
    assert_exact(found, expected, torch.float16)


@pytest.mark.parametrize("causal", [True, False], ids=["own keys", "context"])
@every_backend
def test_the_backward_takes_what_was_merged_over_more_keys(name, causal):
    given = problem(4, 2, 64, keys=LENGTH if causal else CONTEXT)
    backend, (query, key, value, grad) = on_gpu(name, given)
    result = backend.forward(query, key, value, SCALE, causal=causal)
    merged = result.output * 0.5, result.log_sum_exp + 1.0
    # A view of something larger, as slices of a chunk are.
    wider = torch.stack([merged[1], merged[1]], dim=-1)[..., 0]
    found = backend.backward(
        grad, query, key, value, ForwardResult(merged[0], wider, result.extra), SCALE, causal=causal
    )
    query, key, value, grad = given
    merged = tuple(tensor.cpu() for tensor in merged)
    expected = exact_attention.backward(grad, query, key, value, *merged, SCALE, causal)
    exact = exact_attention.forward(query, key, value, SCALE, causal)
    assert_exact((*result[:2], *found), (*exact, *expected), torch.bfloat16)
