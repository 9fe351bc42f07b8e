"""The kernels of csrc/, built as loops of the processor: indices, alignment, rounding, without a GPU."""

import ctypes
import importlib.util
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import kernel_cases as cases
import pytest
import torch

from helixpipe.kernels import build, launch, self_test

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

SHIFTS_OF_THREE = [(0, 0, 0), (1, 1, 1), (0, 1, 2), (3, 0, 3), (4, 4, 4)]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The extension, built for this processor."""
    path = build.build(build.HOST, tmp_path_factory.mktemp("kernels"))
    spec = importlib.util.spec_from_file_location(build.HOST, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.source_hash == build.source_hash()
    return module


@pytest.fixture(scope="module")
def run(module):
    """``run(operator, *arguments)`` with the checks left out, so that everything reaches the kernels."""

    def call(name, *arguments):
        if name in ("swiglu", "gelu", "swiglu_backward", "gelu_backward"):
            base, _, backward = name.partition("_")
            *tensors, form = arguments if base == "gelu" else (*arguments, None)
            function = launch.GELU[form] if base == "gelu" else launch.SWIGLU
            (launch.activation_backward if backward else launch.activation)(module, *tensors, function)
        else:
            getattr(launch, name)(module, *arguments)

    return call


@pytest.fixture
def buffers():
    """Tensors whose surroundings must stay as they are."""
    made = cases.Buffers("cpu")
    yield made
    made.assert_guards_untouched()


KERNELS = {
    "merge_attention": "merge_attention",
    "activation": "swiglu",
    "activation_backward": "swiglu_backward",
    "pack": "pack",
    "accumulate": "accumulate",
}


def with_kernel(module, name, function):
    """The extension with another function in the place of one kernel."""
    kernels = {kernel: getattr(module, kernel) for kernel in KERNELS}
    return SimpleNamespace(most_tensors=module.most_tensors, **(kernels | {name: function}))


def no_image(*arguments):
    raise RuntimeError("CUDA kernel: no kernel image is available for execution on the device\nmore")


def test_the_self_test_launches_every_kernel(module):
    assert self_test.run(module, torch.device("cpu")) == ""
    for kernel, first in KERNELS.items():
        broken = with_kernel(module, kernel, no_image)
        assert self_test.run(broken, torch.device("cpu")) == (
            f"{first}: RuntimeError: CUDA kernel: no kernel image is available for execution on the device"
        )
        silent = with_kernel(module, kernel, lambda *arguments: None)
        assert self_test.run(silent, torch.device("cpu")) == f"{first} computes wrong values"


@pytest.mark.parametrize("dtype", cases.TYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "form"),
    [("swiglu", {}), ("gelu", {"approximate": "tanh"}), ("gelu", {"approximate": "none"})],
    ids=["swiglu", "gelu-tanh", "gelu-erf"],
)
def test_activations(run, buffers, name, form, dtype):
    for length, shifts in itertools.product(cases.LENGTHS, SHIFTS_OF_THREE):
        for rows, with_bias in ((1, False), (3, True), (5, False)):
            cases.check_activation(
                run, buffers, name, dtype, rows, length, shifts,
                with_bias=with_bias, in_place=rows == 5, **form,
            )  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_nothing_to_activate(run, buffers, shape):
    for name, form in (("swiglu", {}), ("gelu", {"approximate": "none"})):
        cases.check_activation(
            run, buffers, name, torch.bfloat16, *shape, (0, 0, 0), with_bias=True, in_place=False, **form
        )


@pytest.mark.parametrize(
    ("dtype", "part_dtype"),
    [*((dtype, dtype) for dtype in cases.TYPES), *((torch.float32, dtype) for dtype in cases.TYPES[1:])],
    ids=str,
)
def test_merging(run, buffers, dtype, part_dtype):
    sizes = [(2, 3, 5, 8), (1, 2, 17, 64), (2, 1, 4, 7), (1, 3, 9, 20), (3, 2, 1, 1), (1, 1, 33, 16)]
    for size, layouts in itertools.product(sizes, itertools.product(cases.LAYOUTS, repeat=2)):
        for shift in (0, 1, 4):
            cases.check_merge(run, buffers, dtype, part_dtype, size, layouts, shift)


def test_merging_nothing(run, buffers):
    for size in ((0, 2, 3, 8), (1, 2, 0, 8), (1, 2, 3, 0)):
        cases.check_merge(run, buffers, torch.bfloat16, torch.bfloat16, size, ("bhsd", "sbhd"))


def test_nan_is_not_lost_in_a_merge(run):
    output, part = torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8)
    own, other = torch.tensor([[[0.0, float("nan")]]]), torch.tensor([[[float("nan"), -torch.inf]]])
    run("merge_attention", output, own, part, other)
    assert own.isnan().all()


@pytest.mark.parametrize("dtype", cases.TYPES, ids=str)
def test_accumulating(run, buffers, dtype):
    for count, total_shift, shift in itertools.product((0, *cases.LENGTHS), range(5), range(9)):
        cases.check_accumulate(run, buffers, dtype, count, (total_shift, shift))


@pytest.mark.parametrize("dtype", [torch.float64, *cases.TYPES], ids=str)
def test_messages(run, dtype):
    for shift in range(9):
        buffers = cases.Buffers("cpu", seed=shift)
        for tensors in cases.messages(buffers, dtype):
            cases.check_message(run, buffers, tensors, dtype, shift)
        buffers.assert_guards_untouched()


def test_bytes_are_packed_too(run):
    tensors = [torch.randint(-128, 128, (n,), dtype=torch.int8)[n % 3 :] for n in range(40)]
    buffer = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=torch.int8)
    run("pack", buffer, tensors)
    assert torch.equal(buffer, torch.cat(tensors))


@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float16, -24), (torch.bfloat16, -120)], ids=str)
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(run, dtype, tiny):
    """silu(40) is 40, and silu(x) is x / 2 for a tiny x: their products with a number are exact in fp32."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for gate, factor in ((40.0, 40.0), (2.0**tiny, 2.0 ** (tiny - 1))):
        input = torch.stack([torch.full_like(every, gate), every], dim=1)
        out = torch.empty(len(every), 1, dtype=dtype)
        run("swiglu", out, input, None)
        expected = (every.float() * factor).to(dtype)
        assert torch.equal(out[:, 0].isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(out[numbers, 0].view(torch.int16), expected[numbers].view(torch.int16))


def test_headers_of_pybind11_may_be_those_that_torch_brings_along(monkeypatch):
    def find(name):
        return None if name in hidden else original(name)

    original, hidden = importlib.util.find_spec, {"pybind11"}
    monkeypatch.setattr(build.importlib.util, "find_spec", find)
    folder = Path(build._pybind11())
    assert folder.is_relative_to(Path(torch.__file__).parent)
    assert (folder / "pybind11" / "stl.h").exists()
    hidden.add("torch")
    with pytest.raises(build.BuildError, match="pip install pybind11"):
        build._pybind11()


def test_sanitized(tmp_path):
    """The same bodies under the address and undefined-behaviour sanitizers, on buffers of exact sizes."""
    program = tmp_path / "bounds"
    source = Path(__file__).with_name("bounds.cpp")
    kernels = [build.SOURCES / f"{name}.cu" for name in build.KERNELS]
    flags = ["-std=c++17", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(
        ["g++", *flags, "-fno-strict-aliasing", "-Wno-unknown-pragmas", f"-I{build.SOURCES}",
         "-x", "c++", str(source), *map(str, kernels), "-o", str(program)],
        check=True,
    )  # fmt: skip
    finished = subprocess.run([program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert int(finished.stdout.split()[0]) > 1000


@pytest.mark.slow
@pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")
def test_cuda_kernels_compile(tmp_path):
    """For every architecture; and the module can be loaded where there is no driver."""
    module = ctypes.PyDLL(str(build.build(build.CUDA, tmp_path)))
    assert hasattr(module, f"PyInit_{build.CUDA}")


@pytest.mark.slow
@pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("kernel", build.KERNELS)
def test_accesses_are_wide_and_registers_suffice(kernel, tmp_path):
    """What the compiler makes of the vectors: 16 bytes at once, and nothing in slow local memory."""
    command = [build.find_nvcc(), "-std=c++17", "-O3", "-arch=sm_90", str(build.SOURCES / f"{kernel}.cu")]
    text = subprocess.run([*command, "-ptx", "-o", "-"], capture_output=True, text=True, check=True).stdout
    entries = text.split(".entry ")[1:]
    assert entries
    for entry in entries:
        wide = [len(re.findall(rf"\b{way}\.global\S*\.v[24]\.[buf](?:32|64)", entry)) for way in ("ld", "st")]
        # Sums of log-sum-exps are single numbers, a tiny part of a merge.
        assert min(wide) > 0 or "MergeSums" in entry[:200], entry[:200]
    cubin = [*command, "-cubin", "-Xptxas", "-v", "-o", str(tmp_path / "out")]
    report = subprocess.run(cubin, capture_output=True, text=True, check=True).stderr
    assert report.count(" 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(entries)
