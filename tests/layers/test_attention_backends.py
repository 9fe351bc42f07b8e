"""Every attention backend through a stand-in with its library's signatures, against float64.

Stand-ins compute in float64 from the arguments that they are given, and refuse types, shapes and layouts as
the libraries do: a wrong order of arguments, layout, scale, mask, or log-sum-exp shows in the results.
"""

import exact_attention
import pytest
import torch
from stand_ins import installed, rules
from stand_ins.aten_kernels import aten_on_cpu

from helixpipe.layers.attention.choice import BACKENDS
from helixpipe.layers.attention.interface import ForwardResult, Spans

ON_GPUS = [name for name, backend in BACKENDS.items() if not backend.on_cpu]
# (query heads, key/value heads, head size): the sizes that models have, one each, shared by some, by all.
HEADS = [(4, 4, 64), (8, 2, 128), (3, 1, 96), (2, 1, 256)]
SCALE = 0.17
LENGTH, CONTEXT = 127, 190
# One token, an odd one, several of them.
BOUNDS = ((0, 1), (1, 64), (64, 67), (67, 127))
# Results are rounded once to 16 bits; gradients also feel that the output was.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

every_backend = pytest.mark.parametrize("name", ON_GPUS)


@pytest.fixture(autouse=True)
def libraries():
    with installed("flash", "engine"), aten_on_cpu():
        yield


def problem(heads, groups, size, *, dtype=torch.bfloat16, batch=2, queries=LENGTH, keys=LENGTH):
    """Query, key, value and the output's gradient as [b, heads, s, d], laid out as [s, b, heads, d]."""
    generator = torch.Generator().manual_seed(heads * size)
    mixed = torch.randn(keys, batch, 3, groups, size, generator=generator).to(dtype)
    # Keys and values are parts of one tensor, as Megatron's are.
    return [
        tensor.permute(1, 2, 0, 3)
        for tensor in (
            torch.randn(queries, batch, heads, size, generator=generator).to(dtype),
            mixed[:, :, 0],
            mixed[:, :, 2],
            torch.randn(queries, batch, heads, size, generator=generator).to(dtype),
        )
    ]


def assert_rounded(found, expected, dtype):
    """Each tensor within one rounding of its largest values, gradients within three."""
    roundings = (1, 1, 3, 3, 3)
    for tensor, wanted, number in zip(found, expected, roundings, strict=True):
        assert tensor.shape == wanted.shape
        limit = number * ROUNDING[dtype] * float(wanted.abs().max())
        assert float((tensor.double() - wanted).abs().max()) <= limit
    assert found[1].dtype is torch.float32
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-6, atol=1e-6)
    assert all(tensor.dtype is dtype for tensor in (found[0], *found[2:]))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "context"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@every_backend
def test_output_log_sum_exp_and_gradients(name, heads, causal):
    backend = BACKENDS[name]()
    query, key, value, grad = problem(*heads, keys=LENGTH if causal else CONTEXT)
    result = backend.forward(query, key, value, SCALE, causal=causal)
    found = (*result[:2], *backend.backward(grad, query, key, value, result, SCALE, causal=causal))
    expected = exact_attention.forward(query, key, value, SCALE, causal)
    expected += exact_attention.backward(grad, query, key, value, *expected, SCALE, causal)
    assert_rounded(found, expected, torch.bfloat16)


@every_backend
def test_packed_sequences(name):
    backend, spans = BACKENDS[name](), Spans(BOUNDS)
    query, key, value, grad = problem(8, 2, 64, dtype=torch.float16, batch=1)
    result = backend.forward(query, key, value, SCALE, spans=spans)
    found = (*result[:2], *backend.backward(grad, query, key, value, result, SCALE, spans=spans))
    expected = exact_attention.forward_packed(query, key, value, SCALE, BOUNDS)
    expected += exact_attention.backward_packed(grad, query, key, value, *expected, SCALE, BOUNDS)
    assert_rounded(found, expected, torch.float16)


@pytest.mark.parametrize("causal", [True, False], ids=["own keys", "context"])
@every_backend
def test_the_backward_takes_what_was_merged_over_more_keys(name, causal):
    """Gradients through a part of the keys, by the output and log-sum-exp over all of them."""
    backend = BACKENDS[name]()
    query, key, value, grad = problem(4, 2, 64, keys=LENGTH if causal else CONTEXT)
    result = backend.forward(query, key, value, SCALE, causal=causal)
    merged = result.log_sum_exp + 1.0, result.output * 0.5
    # A view of something larger, as slices of a chunk are.
    wider = torch.stack([merged[0], merged[0]], dim=-1)[..., 0]
    found = backend.backward(
        grad, query, key, value, ForwardResult(merged[1], wider, result.extra), SCALE, causal=causal
    )
    expected = exact_attention.backward(grad, query, key, value, merged[1], merged[0], SCALE, causal)
    assert_rounded((*result[:2], *found), (result[0].double(), result[1].double(), *expected), torch.bfloat16)


@every_backend
def test_an_expanded_gradient(name):
    """That of a sum is one number everywhere."""
    backend = BACKENDS[name]()
    query, key, value, _ = problem(4, 2, 64)
    grad = torch.ones((), dtype=query.dtype).expand(query.shape)
    result = backend.forward(query, key, value, SCALE)
    found = backend.backward(grad, query, key, value, result, SCALE)
    expected = exact_attention.forward(query, key, value, SCALE, True)
    expected += exact_attention.backward(grad, query, key, value, *expected, SCALE, True)
    # The gradients of values are all that is large: those of the others cancel.
    limit = 3 * ROUNDING[query.dtype] * float(expected[4].abs().max())
    assert float((found[2].double() - expected[4]).abs().max()) <= limit


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["flash-attn-2", "flash-attn-3", "te-cudnn"])
@pytest.mark.parametrize("bounds", [None, BOUNDS], ids=["whole", "packed"])
def test_deterministic_gradients_are_asked_for(name, deterministic, bounds):
    backend = BACKENDS[name]()
    query, key, value, grad = problem(2, 2, 64, batch=1)
    spans = None if bounds is None else Spans(bounds)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        result = backend.forward(query, key, value, SCALE, spans=spans)
        backend.backward(grad, query, key, value, result, SCALE, spans=spans)
    finally:
        torch.use_deterministic_algorithms(before)
    assert rules.seen[name] == {"deterministic": deterministic}


@pytest.mark.parametrize("name", [name for name in ON_GPUS if not BACKENDS[name].packs])
def test_packed_sequences_are_launched_one_by_one(name, monkeypatch):
    calls = []
    backend = BACKENDS[name]()
    original = backend.forward_whole
    monkeypatch.setattr(backend, "forward_whole", lambda *a: calls.append(a[0].shape[2]) or original(*a))
    query, key, value, _ = problem(2, 2, 64, batch=1)
    backend.forward(query, key, value, SCALE, spans=Spans(BOUNDS))
    assert calls == [last - first for first, last in BOUNDS]


def test_offsets_of_spans_are_made_once():
    spans = Spans(BOUNDS)
    offsets = spans.offsets(torch.device("cpu"))
    assert offsets.dtype is torch.int32
    assert offsets.tolist() == [0, 1, 64, 67, 127]
    assert spans.offsets(torch.device("cpu")) is offsets
    assert spans.longest == 63


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("flash-attn-2", lambda q, k, v: (q.float(), k, v), "float32"),
        ("flash-attn-3", lambda q, k, v: (q[..., :20], k[..., :20], v[..., :20]), "head size 20"),
        ("cudnn", lambda q, k, v: (q, k[:, :, :1], v[:, :, :2]), "key and value differ"),
        ("aten-flash", lambda q, k, v: (q[:, :3], k, v), "multiple of groups"),
    ],
)
def test_stand_ins_refuse_what_the_libraries_refuse(name, spoil, reason):
    query, key, value, _ = problem(4, 2, 64)
    with pytest.raises(RuntimeError, match=reason):
        BACKENDS[name]().forward(*spoil(query, key, value), SCALE, causal=False)
