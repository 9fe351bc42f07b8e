"""The kernels on a GPU against float64, misaligned and at all small sizes, and beyond 2^31 elements."""

import itertools

import kernel_cases as cases
import pytest
import torch

from helixpipe import kernels
from helixpipe.kernels import extension, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHIFTS_OF_THREE = [(0, 0, 0), (1, 1, 1), (0, 1, 2), (4, 4, 4)]


@pytest.fixture(scope="module", autouse=True)
def built():
    assert extension.load() is not None, "build the kernels first: python -m helixpipe.kernels"


def run(name, *arguments):
    getattr(kernels, name)(*arguments)


@pytest.fixture
def buffers():
    """Tensors whose surroundings must stay as they are."""
    made = cases.Buffers("cuda")
    yield made
    made.assert_guards_untouched()


@pytest.mark.parametrize("dtype", cases.TYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "form"),
    [("swiglu", {}), ("gelu", {"approximate": "tanh"}), ("gelu", {"approximate": "none"})],
    ids=["swiglu", "gelu-tanh", "gelu-erf"],
)
def test_activations(buffers, name, form, dtype):
    sizes = [*itertools.product((1, 3), (1, 7, 8, 9, 16, 33, 127)), (0, 8), (2, 0), (37, 11008), (257, 1000)]
    for (rows, length), shifts in itertools.product(sizes, SHIFTS_OF_THREE):
        for with_bias, in_place in ((False, True), (True, False)):
            cases.check_activation(
                run,
                buffers,
                name,
                dtype,
                rows,
                length,
                shifts,
                with_bias=with_bias,
                in_place=in_place,
                **form,
            )


@pytest.mark.parametrize(
    ("dtype", "part_dtype"),
    [*((dtype, dtype) for dtype in cases.TYPES), *((torch.float32, dtype) for dtype in cases.TYPES[1:])],
    ids=str,
)
def test_merging(buffers, dtype, part_dtype):
    sizes = [(2, 3, 5, 8), (1, 2, 17, 64), (2, 1, 4, 7), (1, 8, 129, 128), (0, 1, 2, 8), (1, 1, 3, 256)]
    for size, layouts in itertools.product(sizes, itertools.product(cases.LAYOUTS, repeat=2)):
        for shift in (0, 1):
            cases.check_merge(run, buffers, dtype, part_dtype, size, layouts, shift)


@pytest.mark.parametrize("dtype", cases.TYPES, ids=str)
def test_accumulating(buffers, dtype):
    for count, total_shift, shift in itertools.product((0, *cases.LENGTHS, 10**6 + 1), (0, 1, 4), (0, 1, 4)):
        cases.check_accumulate(run, buffers, dtype, count, (total_shift, shift))


@pytest.mark.parametrize("dtype", [torch.float64, *cases.TYPES], ids=str)
def test_messages(buffers, dtype):
    for shift in (0, 1, 8):
        for tensors in cases.messages(buffers, dtype):
            cases.check_message(run, buffers, tensors, dtype, shift)


def test_attention_in_parts_is_attention(buffers):
    """FlashAttention's own outputs and log-sum-exps, in the layout in which it returns them."""
    aten = torch.ops.aten
    query, key, value = (torch.randn(1, 4, 512, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def attend(first, last):
        found = aten._scaled_dot_product_flash_attention(
            query, key[:, :, first:last], value[:, :, first:last]
        )
        return found[0], found[1]

    output, sums = attend(0, 100)
    output, sums = output.float(), sums.clone()
    for first, last in ((100, 333), (333, 512)):
        kernels.merge_attention(output, sums, *attend(first, last))
    exact = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in (query, key, value)))
    whole = attend(0, 512)
    error, own = (float((t.double() - exact).norm() / exact.norm()) for t in (output, whole[0]))
    assert error <= 2 * own
    torch.testing.assert_close(sums, whole[1], rtol=1e-5, atol=1e-5)


def test_on_the_current_stream(buffers):
    """A kernel waits for what its stream does, and no other."""
    total, gradient = torch.zeros(1 << 24, device="cuda"), torch.zeros(1 << 24, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        gradient.fill_(3)
        kernels.accumulate(total, gradient)
    stream.synchronize()
    assert (total == 3).all()


def test_in_a_captured_graph():
    total, gradient = torch.zeros(1000, device="cuda"), torch.ones(1000, device="cuda", dtype=torch.bfloat16)
    kernels.accumulate(total, gradient)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.accumulate(total, gradient)
    graph.replay()
    graph.replay()
    assert (total == 3).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.cpu(), "different devices"),
        (lambda t: t.to(torch.int32), "not supported"),
        (lambda t: torch.stack([t, t], dim=1)[:, 0], "not contiguous"),
        (lambda t: t[1:], "differ"),
    ],
    ids=["device", "type", "layout", "shape"],
)
def test_refused_before_anything_runs(change, reason):
    total, gradient = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    with pytest.raises(ValueError, match=reason):
        kernels.accumulate(total, change(gradient))
    torch.cuda.synchronize()
    assert not total.any()


# Beyond 2^31 elements: the last ones, and those around the 2^31st, where a 32-bit index turns negative.

HUGE = 2**31 + 2**20 + 3


def probes(count):
    middle = torch.arange(2**31 - 64, 2**31 + 64, device="cuda")
    return torch.cat(
        [torch.arange(64, device="cuda"), middle, torch.arange(count - 64, count, device="cuda")]
    )


def fill(*shape, dtype=torch.bfloat16):
    """Values that differ between any two places 2^31 or 2^32 elements apart."""
    tensor = torch.empty(shape, dtype=dtype, device="cuda")
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), 1 << 28):
        part = flat[start : start + (1 << 28)]
        part.copy_(torch.arange(part.numel(), device="cuda", dtype=torch.int32).remainder_(251))
        part.sub_(125).div_(64).add_((start >> 28) / 64)
    return tensor


@pytest.mark.slow
def test_accumulating_beyond_2_31():
    total, gradient = torch.zeros(HUGE, device="cuda"), fill(HUGE)
    kernels.accumulate(total, gradient)
    assert torch.equal(total[probes(HUGE)], gradient[probes(HUGE)].float())
    assert torch.equal(total[:: 2**16 + 1], gradient[:: 2**16 + 1].float())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_activations_beyond_2_31(name):
    length = 11008
    factor, extra = (2, ()) if name == "swiglu" else (1, ("tanh",))
    rows = HUGE // length + 2
    input = fill(rows, factor * length)
    out = torch.full((rows, length), torch.nan, dtype=torch.bfloat16, device="cuda")
    run(name, out, input, None, *extra)
    some = torch.tensor(
        [0, 1, 2**31 // length, 2**31 // length + 1, 2**30 // length, rows - 1], device="cuda"
    )
    expected = torch.empty(len(some), length, dtype=torch.bfloat16, device="cuda")
    getattr(reference, name)(expected, input[some], None, *extra)
    torch.testing.assert_close(out[some], expected, rtol=0.01, atol=1e-5)
    grad_input = torch.empty(len(some), factor * length, dtype=torch.bfloat16, device="cuda")
    getattr(reference, f"{name}_backward")(grad_input, expected, input[some], None, *extra)
    run(f"{name}_backward", input, out, input, None, *extra)
    torch.testing.assert_close(input[some], grad_input, rtol=0.02, atol=1e-3)


@pytest.mark.slow
def test_messages_beyond_2_31():
    parts = [fill(7), fill(2**31 + 64), fill(1 << 20)]
    buffer = torch.empty(sum(t.numel() for t in parts), dtype=torch.bfloat16, device="cuda")
    kernels.pack(buffer, parts)
    place = 0
    for part in parts:
        assert torch.equal(buffer[place : place + part.numel()], part)
        place += part.numel()


@pytest.mark.slow
def test_merging_beyond_2_31():
    b, h, s, d = 1, 32, 2**19 + 64, 128
    output, part = fill(s, b, h, d).permute(1, 2, 0, 3), fill(s, b, h, d).permute(1, 2, 0, 3)
    sums = [torch.full((b, h, s), value, device="cuda") for value in (0.0, 1.0)]
    some = torch.tensor([0, 2**18, 2**19 - 1, 2**19, s - 1], device="cuda")
    expected, expected_sums = output[:, :, some].clone(), sums[0][:, :, some].clone()
    reference.merge_attention(expected, expected_sums, part[:, :, some].clone(), sums[1][:, :, some])
    kernels.merge_attention(output, sums[0], part, sums[1])
    torch.testing.assert_close(output[:, :, some], expected, rtol=0.01, atol=1e-5)
    torch.testing.assert_close(sums[0], sums[0].new_full(sums[0].shape, float(expected_sums[0, 0, 0])))
