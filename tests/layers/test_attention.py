"""Core attention against float64 arithmetic with explicit scores, and against Megatron's own."""

import math
from functools import partial

import models
import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from pretend import pretend_rank
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from helixpipe.layers.attention.aten import AtenCpu, AtenEfficient, AtenFlash
from helixpipe.layers.attention.core import FlashCoreAttention, causal_attention

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this backend runs on a GPU")
BACKENDS = [
    pytest.param("cpu", torch.float64, AtenCpu, id="cpu-float64"),
    pytest.param("cpu", torch.float32, AtenCpu, id="cpu-float32"),
    pytest.param("cpu", torch.bfloat16, AtenCpu, id="cpu-bfloat16"),
    pytest.param("cuda", torch.bfloat16, AtenFlash, id="flash-bfloat16", marks=needs_cuda),
    pytest.param("cuda", torch.float16, AtenFlash, id="flash-float16", marks=needs_cuda),
    pytest.param("cuda", torch.float32, AtenEfficient, id="efficient-float32", marks=needs_cuda),
]
# (query heads, key/value heads, head size): one each, shared by two, shared by all.
HEADS = [(4, 4, 16), (4, 2, 8), (3, 1, 24)]
LENGTH, BATCH = 127, 2


def explicit(query, key, value, scale=None):
    """Softmax over all s x s scores."""
    length, _, heads, size = query.shape
    key, value = (tensor.repeat_interleave(heads // tensor.shape[2], dim=2) for tensor in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * (1 / math.sqrt(size) if scale is None else scale)
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    probabilities = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    return torch.einsum("bhst,tbhd->sbhd", probabilities, value).flatten(2)


def torch_math(query, key, value):
    """PyTorch's attention with explicit scores, computed in the type of its inputs throughout."""
    grouped = query.shape[2] != key.shape[2]
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    # Otherwise half precision is computed in float32, which is no reference of the same precision.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
    return output.permute(2, 0, 1, 3).flatten(2)


def problem(heads, groups, size, dtype=torch.float64, device="cpu", length=LENGTH):
    """Query, key, value and the output's gradient, exact in ``dtype``."""
    generator = torch.Generator().manual_seed(heads * groups)
    shapes = [(length, BATCH, heads, size)] + 2 * [(length, BATCH, groups, size)]
    shapes.append((length, BATCH, heads * size))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def forward_and_backward(function, inputs, dtype):
    """The output and the gradients of query, key and value."""
    *inputs, grad = (tensor.to(dtype) for tensor in inputs)
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def errors(found, expected):
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("device", "dtype", "backend"), BACKENDS)
def test_output_and_gradients(device, dtype, backend, heads):
    inputs = problem(*heads, dtype, device)
    expected = forward_and_backward(explicit, inputs, torch.float64)
    found = forward_and_backward(partial(causal_attention, backend=backend()), inputs, dtype)
    assert all(tensor.dtype is dtype for tensor in found)
    limits = [1e-12] * 4
    if dtype is not torch.float64:
        limits = [2 * e for e in errors(forward_and_backward(torch_math, inputs, dtype), expected)]
    for error, limit in zip(errors(found, expected), limits, strict=True):
        assert error <= limit


def test_cpu_kernels_that_take_no_groups_get_repeated_heads(monkeypatch):
    inputs = problem(4, 2, 8)
    expected = forward_and_backward(explicit, inputs, torch.float64)
    monkeypatch.setattr(AtenCpu, "TAKES_GROUPS", False)
    found = forward_and_backward(causal_attention, inputs, torch.float64)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    assert max(errors(found, expected)) < 1e-12


@pytest.mark.parametrize("length", [1, 2, 31, 33, 300])
def test_lengths_around_the_kernels_blocks(length):
    inputs = problem(4, 2, 8, length=length)
    expected = forward_and_backward(explicit, inputs, torch.float64)
    for found, wanted in zip(
        forward_and_backward(causal_attention, inputs, torch.float64), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_scale():
    inputs = problem(4, 2, 8)
    found = causal_attention(*inputs[:3], scale=0.7)
    torch.testing.assert_close(found, explicit(*inputs[:3], scale=0.7), rtol=0, atol=1e-12)
    assert (found - causal_attention(*inputs[:3])).norm() > 1e-3


def test_strided_inputs_and_an_expanded_gradient():
    """Query, key and value are often parts of one tensor, and a sum's gradient is one number everywhere."""
    mixed = torch.randn(LENGTH, BATCH, 2, 4, 8, dtype=torch.float64, requires_grad=True)

    def total(attention):
        query, key, value = mixed[..., :2, :].flatten(2, 3), mixed[..., 2, :], mixed[..., 3, :]
        return torch.autograd.grad(attention(query, key, value).sum(), mixed)[0]

    torch.testing.assert_close(total(causal_attention), total(explicit), rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("device", "dtype", "backend"), BACKENDS)
def test_log_sum_exp(device, dtype, backend, heads):
    query, key, value, _ = problem(*heads, dtype, device)
    scale = 0.3
    result = backend().forward(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)), scale)
    key = key.repeat_interleave(heads[0] // heads[1], dim=2)
    scores = torch.einsum("sbhd,tbhd->bhst", query.double(), key.double()) * scale
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).triu(1)
    expected = scores.masked_fill(future, -math.inf).logsumexp(dim=-1)
    found = result.log_sum_exp.double()
    # The log-sum-exp is kept in float32 at least, whatever the type of the inputs.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if dtype is torch.float64 else 1e-4)


def largest_allocation(function):
    """Bytes of the largest block that was allocated, inside of kernels too."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def test_memory_does_not_hold_the_scores():
    length, heads = 4096, 2
    inputs = [torch.randn(length, 1, heads, 8, requires_grad=True) for _ in range(3)]

    def run(attention):
        return largest_allocation(lambda: attention(*inputs).sum().backward())

    scores_of_a_head = length * length * 4
    assert run(causal_attention) < scores_of_a_head / 16
    assert run(torch_math) >= scores_of_a_head


def make_core(config, mask=AttnMaskType.causal, kind="self", **options):
    return FlashCoreAttention(config, 1, mask, kind, **options)


@pytest.mark.parametrize("softmax_scale", [None, 0.4])
def test_core_attention_equals_megatrons_own(softmax_scale):
    case = models.Case(pp=1, style="llama")
    config = models.make_config(case)
    query, key, value, _ = problem(4, 2, 8, torch.float32)
    with pretend_rank(case):
        stock = DotProductAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=softmax_scale)
        expected = stock(query, key, value, None)
    core = make_core(config, softmax_scale=softmax_scale, cp_comm_type="p2p", pg_collection=None)
    torch.testing.assert_close(core(query, key, value, None), expected, rtol=0, atol=1e-6)
    assert not list(core.parameters())


def configured(**values):
    """Set after construction, because Megatron refuses some of these without a GPU."""
    config = models.make_config(models.Case(pp=1))
    for name, value in values.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("config", "arguments", "named"),
    [
        ({"attention_dropout": 0.1}, {}, r"dropout \(0.1\)"),
        ({}, {"attention_dropout": 0.2}, r"dropout \(0.2\)"),
        ({}, {"mask": AttnMaskType.padding}, "causal"),
        ({}, {"mask": AttnMaskType.no_mask}, "causal"),
        ({}, {"kind": "cross"}, "self-attention"),
        ({"window_size": (16, 2)}, {}, "--window-size 16,2 reaches 2 tokens ahead; use 16,0"),
        ({"apply_query_key_layer_scaling": True}, {}, "query-key layer scaling"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(config, arguments, named):
    with pytest.raises(ValueError, match=named):
        make_core(configured(**config), **arguments)


def test_an_explicit_dropout_of_zero_overrules_the_configuration():
    make_core(configured(attention_dropout=0.1), attention_dropout=0.0)


@pytest.mark.parametrize("argument", ["attention_bias", "packed_seq_params"])
def test_arguments_that_would_be_ignored_are_refused(argument):
    query, key, value, _ = problem(4, 2, 8)
    with pytest.raises(ValueError, match="not supported"):
        make_core(configured())(query, key, value, **{argument: torch.zeros(1)})
