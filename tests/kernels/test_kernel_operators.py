"""The operators of ``torch.ops.helixpipe`` on a CPU: what they compute, accept and refuse."""

import itertools
import math
import re

import kernel_cases as cases
import pytest
import torch

from helixpipe import kernels
from helixpipe.kernels import build, extension

ops = torch.ops.helixpipe


def examples(dtype=torch.float32):
    """One call of each operator by name."""

    def random(*shape, dtype=dtype):
        return torch.randn(*shape).to(dtype)

    return {
        "merge_attention": (
            random(2, 3, 5, 8), random(2, 3, 5, dtype=torch.float32),
            random(5, 2, 3, 8).permute(1, 2, 0, 3), random(2, 3, 5, dtype=torch.float32),
        ),
        "swiglu": (random(2, 3, 7), random(2, 3, 14), random(14)),
        "swiglu_backward": (random(3, 14), random(3, 7), random(3, 14), None),
        "gelu": (random(3, 7), random(3, 7), random(7), "tanh"),
        "gelu_backward": (random(3, 7), random(3, 7), random(3, 7), None, "none"),
        "pack": (random(22), [random(3, 4).t(), random(2, 5)]),
        "accumulate": (random(3, 7, dtype=torch.float32), random(3, 7)),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", cases.TYPES, ids=str)
@pytest.mark.parametrize("name", examples())
def test_torch_finds_nothing_wrong_with_an_operator(name, dtype):
    """Schema, fakes, and tracing with fixed and with symbolic shapes."""
    torch.library.opcheck(getattr(ops, name).default, examples(dtype)[name])


def changed(arguments, change, only=None):
    """Arguments with ``change`` made to every tensor, or to the one of this number."""
    numbers = itertools.count()

    def of(value):
        if isinstance(value, list):
            return [of(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        return change(value) if only in (None, next(numbers)) else value

    return [of(value) for value in arguments]


@pytest.mark.parametrize("name", examples())
def test_meta_tensors(name):
    assert getattr(ops, name)(*changed(examples()[name], lambda tensor: tensor.to("meta"))) is None


@pytest.mark.parametrize("name", examples())
def test_a_graph_without_breaks(name):
    def function(*arguments):
        getattr(kernels, name)(*arguments)
        return arguments[0] * 2

    arguments = examples()[name]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = [call(*changed(arguments, torch.clone)) for call in (function, compiled)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
@pytest.mark.parametrize("form", ["none", "tanh"])
def test_backwards_are_autograds(name, form):
    input = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64)
    if name == "swiglu":
        gate, up = (input + bias).chunk(2, dim=-1)
        expected, extra = torch.nn.functional.silu(gate) * up, ()
    else:
        expected, extra = torch.nn.functional.gelu(input + bias, approximate=form), (form,)
    out, grad = torch.empty_like(expected), torch.randn_like(expected)
    getattr(kernels, name)(out, input.detach(), bias, *extra)
    torch.testing.assert_close(out, expected.detach())
    grad_input = torch.empty_like(input)
    getattr(kernels, f"{name}_backward")(grad_input, grad, input.detach(), bias, *extra)
    torch.testing.assert_close(grad_input, torch.autograd.grad(expected, input, grad)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_merge_to_the_attention_over_all_keys(dtype):
    """Scores of queries with all keys, in three parts of which one is hidden from some queries."""
    s, d, cuts = 9, 8, (0, 2, 7, 12)
    query, key, value = (torch.randn(2, 3, n, d) for n in (s, cuts[-1], cuts[-1]))
    scores = query @ key.transpose(-1, -2)
    scores[:, :, :4, 7:] = -math.inf

    def attention(first, last):
        own = scores[..., first:last]
        return own.softmax(-1).to(dtype) @ value[:, :, first:last].to(dtype), own.logsumexp(-1)

    output, sums = attention(*cuts[:2])
    output = output.float()
    for first, last in itertools.pairwise(cuts[1:]):
        kernels.merge_attention(output, sums, *attention(first, last))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(output, scores.softmax(-1) @ value, **tolerance)
    torch.testing.assert_close(sums, scores.logsumexp(-1), rtol=1e-5, atol=1e-6)


F16, BF16 = torch.float16, torch.bfloat16


def row(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def merging(**changes):
    """Arguments of a merge that is in order but for ``changes``."""
    sound = {
        "output": row(1, 2, 3, 4),
        "sums": row(1, 2, 3),
        "part": row(1, 2, 3, 4),
        "part_sums": row(1, 2, 3),
    }
    return tuple((sound | changes).values())


COMPLEX = row(2, dtype=torch.complex64)
INTEGERS = row(2, 2, dtype=torch.int32)
# An operator, its arguments, and what its error says.
WRONG = {
    "merge: shape": ("merge_attention", merging(part=row(1, 2, 4, 4)), "twice"),
    "merge: sums": ("merge_attention", merging(sums=row(1, 3, 2)), "(1, 2, 3)"),
    "merge: heads": ("merge_attention", merging(output=row(1, 2, 4, 3).mT), "heads must be contiguous"),
    "merge: type": ("merge_attention", merging(output=row(1, 2, 3, 4, dtype=BF16)), "cannot merge"),
    "merge: type of sums": (
        "merge_attention",
        merging(sums=row(1, 2, 3, dtype=F16)),
        "must be torch.float32",
    ),
    "merge: overlap": ("merge_attention", merging(output=row(1, 1, 3, 4).expand(1, 2, 3, 4)), "overlap"),
    "swiglu: shape": ("swiglu", (row(3, 4), row(3, 9)), "(3, 8)"),
    "swiglu: rows": ("swiglu", (row(3, 4), row(2, 8)), "(3, 8)"),
    "swiglu: bias": ("swiglu", (row(3, 4), row(3, 8), row(4)), "bias (8,)"),
    "swiglu: slice of columns": ("swiglu", (row(3, 4), row(3, 9)[:, :8]), "not contiguous"),
    "swiglu: types": ("swiglu", (row(3, 4), row(3, 8, dtype=BF16)), "one type"),
    "swiglu: integers": ("swiglu", (INTEGERS[:, :1].contiguous(), INTEGERS), "not supported"),
    "swiglu: devices": ("swiglu", (row(3, 4), row(3, 8, device="meta")), "different devices: cpu, meta"),
    "swiglu: no rows": ("swiglu", (row(), row()), "has no rows"),
    "swiglu_backward: shape": ("swiglu_backward", (row(3, 4), row(3, 4), row(3, 8)), "(3, 8)"),
    "gelu: form": ("gelu", (row(3), row(3), None, "sigmoid"), "one of none, tanh, not 'sigmoid'"),
    "gelu_backward: shape": ("gelu_backward", (row(3), row(4), row(3)), "(4,)"),
    "pack: size": ("pack", (row(5), [row(2), row(4)]), "buffer (6,), not (5,)"),
    "pack: type": ("pack", (row(6), [row(2), row(4, dtype=F16)]), "one type"),
    "pack: buffer": ("pack", (row(12)[::2], [row(2), row(4)]), "not contiguous"),
    "pack: complex": ("pack", (COMPLEX, [COMPLEX]), "not supported"),
    "accumulate: sum": ("accumulate", (row(3, dtype=BF16), row(3, dtype=BF16)), "must be torch.float32"),
    "accumulate: shape": ("accumulate", (row(3), row(4)), "differ: (3,), (4,)"),
    "accumulate: layout": ("accumulate", (row(3, 4), row(4, 3).t()), "not contiguous"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused_and_why(case):
    name, arguments, reason = WRONG[case]
    with pytest.raises(ValueError, match=f"^{name}: .*{re.escape(reason)}"):
        getattr(kernels, name)(*arguments)


CHANGES = {
    "device": lambda tensor: tensor.to("meta"),
    "integers": lambda tensor: tensor.int(),
    "fewer columns": lambda tensor: tensor[..., 1:].contiguous(),
    "more dimensions": lambda tensor: torch.stack([tensor, tensor]),
    "every other column": lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
}
# (operator, change) -> the tensors, by number, that may be so.
ACCEPTED = {
    ("merge_attention", "every other column"): {1, 3},
    ("pack", "every other column"): {1, 2},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", examples())
def test_every_tensor_is_checked(name, change):
    """One that does not fit the others is a clear error, whichever it is, and nothing is written."""
    arguments = examples()[name]
    count = sum(len(value) if isinstance(value, list) else value is not None for value in arguments)
    count -= sum(isinstance(value, str) for value in arguments)
    for number in range(count):
        given = changed(arguments, CHANGES[change], only=number)
        before = changed(given, torch.clone)
        if number in ACCEPTED.get((name, change), ()):
            getattr(kernels, name)(*given)
            continue
        with pytest.raises(ValueError, match=f"^{name}: "):
            getattr(kernels, name)(*given)
        for tensor, old in zip(given, before, strict=True):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                assert torch.equal(tensor, old)


def test_kernels_that_are_missing_or_stale_are_reported_once(monkeypatch):
    monkeypatch.setattr(extension, "CUDA", "_not_there")
    extension.load.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"were not built; torch's .* python -m helixpipe\.kernels$"):
        assert extension.load() is None
    assert extension.load() is None
    extension.load.cache_clear()
    monkeypatch.setattr(extension, "CUDA", "build")  # any module that can be imported
    monkeypatch.setattr(extension, "source_hash", lambda: "another")
    with pytest.warns(RuntimeWarning, match="were built from other sources"):
        assert extension.load() is None
    extension.load.cache_clear()


def test_kernels_that_fail_when_they_are_launched_are_not_used(monkeypatch):
    """The module can be imported and is of these sources, but its first launch raises."""

    def merge_attention(*arguments):
        raise RuntimeError("CUDA kernel: the provided PTX was compiled with an unsupported toolchain")

    monkeypatch.setattr(extension, "CUDA", "build")  # any module that can be imported
    monkeypatch.setattr(extension, "source_hash", str)
    monkeypatch.setattr(build, "merge_attention", merge_attention, raising=False)
    extension.load.cache_clear()
    reason = r"do not work here \(merge_attention: RuntimeError: .* unsupported toolchain\); torch's"
    with pytest.warns(RuntimeWarning, match=reason):
        assert extension.load() is None
    assert extension.load() is None
    extension.load.cache_clear()
