"""The CPU backend: what it redirects, that nothing else changes, and when it stays away."""

import subprocess
import sys

import pytest
import torch
from models import cpu_backend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

# Megatron's modules can only be imported where CUDA's names have been redirected.
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402

CPU = torch.device("cpu")
CUDA = ["cuda", "cuda:0", "cuda:3", torch.device("cuda"), torch.device("cuda", 1)]
FACTORIES = {
    "arange": (3,),
    "empty": (3,),
    "full": ((3,), 1.5),
    "ones": (3,),
    "rand": (3,),
    "randn": (3,),
    "tensor": ([1.0, 2.0, 3.0],),
    "zeros": (3,),
}
LIKE_FACTORIES = {
    "empty_like": (),
    "full_like": (1.5,),
    "ones_like": (),
    "rand_like": (),
    "randn_like": (),
    "zeros_like": (),
}


def redirected():
    """Everything that installing puts in place."""
    names = (*FACTORIES, *LIKE_FACTORIES)
    return [
        *(getattr(torch, name) for name in names),
        *(getattr(torch.Tensor, name) for name in ("to", "cuda", "type")),
        torch.nn.Module.cuda,
        *(getattr(torch.cuda, name) for name in ("current_device", "synchronize", "set_device")),
        *(getattr(torch.cuda, name) for name in ("get_rng_state", "manual_seed")),
        megatron_random._get_cuda_rng_state,
        megatron_random._set_cuda_rng_state,
        clip_grads.clip_grad_by_total_norm_fp32,
        optimizer.clip_grad_by_total_norm_fp32,
        optimizer.Float16OptimizerWithFloat16Params.__init__,
        distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups.__func__,
    ]


def test_installing_twice_changes_nothing_more():
    assert cpu_backend.install()
    before = redirected()
    assert cpu_backend.install()
    assert all(a is b for a, b in zip(redirected(), before, strict=True))


@pytest.mark.parametrize("device", CUDA, ids=str)
@pytest.mark.parametrize("name", FACTORIES)
def test_factories_make_cpu_tensors(name, device):
    tensor = getattr(torch, name)(*FACTORIES[name], device=device, dtype=torch.float64)
    assert (tensor.device, tensor.dtype, tensor.shape) == (CPU, torch.float64, (3,))


@pytest.mark.parametrize("device", CUDA, ids=str)
@pytest.mark.parametrize("name", LIKE_FACTORIES)
def test_like_factories_make_cpu_tensors(name, device):
    tensor = getattr(torch, name)(torch.zeros(3, dtype=torch.float64), *LIKE_FACTORIES[name], device=device)
    assert (tensor.device, tensor.dtype, tensor.shape) == (CPU, torch.float64, (3,))


@pytest.mark.parametrize("device", CUDA, ids=str)
def test_moves_stay_where_they_are(device):
    tensor = torch.arange(3)
    module = torch.nn.Linear(2, 2)
    for moved in (tensor.to(device), tensor.to(device=device), tensor.to(device, torch.float64)):
        assert moved.device == CPU
        assert moved.tolist() == [0, 1, 2]
    assert tensor.to(device, torch.float64).dtype is torch.float64
    assert tensor.cuda() is tensor
    assert tensor.cuda(0, non_blocking=True) is tensor
    assert module.cuda() is module
    assert {parameter.device for parameter in module.to(device).parameters()} == {CPU}


def test_the_current_device_is_the_cpu():
    assert torch.zeros(1, device=torch.cuda.current_device()).device == CPU
    torch.cuda.set_device(0)
    torch.cuda.synchronize()


def test_other_devices_and_conversions_are_left_alone():
    assert torch.empty(3, device="meta").device.type == "meta"
    assert torch.zeros(2).to("meta").device.type == "meta"
    assert torch.zeros(2).to(torch.float64).dtype is torch.float64
    assert torch.zeros(2).to(torch.ones(2, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert torch.full((2,), 7).tolist() == [7, 7]
    assert torch.arange(1, 7, 2).tolist() == [1, 3, 5]


SEED = 11


@pytest.fixture
def tracker():
    made = megatron_random.CudaRNGStatesTracker()
    made.add("a", SEED)
    made.add("b", SEED + 1)
    return made


def stream(seed, count):
    """The first numbers that a seed gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [torch.rand(1).item() for _ in range(count)]


def draw(count=1):
    return [torch.rand(1).item() for _ in range(count)]


def test_a_fork_has_its_own_numbers_and_gives_the_outer_ones_back(tracker):
    torch.manual_seed(3)
    outer = draw()
    with tracker.fork("a"):
        inner = draw(2)
    outer += draw()
    with tracker.fork("a"):
        inner += draw(2)
    outer += draw()
    assert outer == stream(3, 3)
    # The second fork went on where the first had ended.
    assert inner == stream(SEED, 4)


def test_a_nested_fork_of_the_same_name_continues_its_sequence(tracker):
    torch.manual_seed(3)
    with tracker.fork("a"):
        numbers = draw(2)
        with tracker.fork("a"):
            numbers += draw(2)
        numbers += draw(1)
    with tracker.fork("a"):
        numbers += draw(1)
    assert numbers == stream(SEED, 6)
    assert draw() == stream(3, 1)


def test_nested_forks_of_different_names_do_not_mix(tracker):
    with tracker.fork("a"):
        first = draw()
        with tracker.fork("b"):
            second = draw(2)
        first += draw(2)
    with tracker.fork("b"):
        second += draw()
    assert first == stream(SEED, 3)
    assert second == stream(SEED + 1, 3)


def test_an_error_inside_a_fork_gives_the_outer_numbers_back(tracker):
    def fail():
        with tracker.fork("a"):
            draw(5)
            raise ArithmeticError

    torch.manual_seed(3)
    with pytest.raises(ArithmeticError):
        fail()
    assert draw() == stream(3, 1)


def test_forks_do_not_warn_about_the_generator_they_are_meant_to_move(tracker, caplog):
    with tracker.fork("a"):
        draw()
    assert not caplog.records
    # Other warnings of that module still come through, where nobody has silenced all of megatron.core.
    caplog.set_level("WARNING", logger=megatron_random.__name__)
    megatron_random.logging.getLogger(megatron_random.__name__).warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


def test_cpu_tensors_answer_to_cuda_names_inside_the_wrapped_functions_only():
    tensors = {dtype: torch.zeros(1, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    names = cpu_backend._with_cuda_type_names(lambda: [tensor.type() for tensor in tensors.values()])
    outside = ["torch.FloatTensor", "torch.BFloat16Tensor", "torch.HalfTensor"]
    for _ in range(2):
        assert [tensor.type() for tensor in tensors.values()] == outside
        assert names() == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", "torch.cuda.HalfTensor"]
    convert = cpu_backend._with_cuda_type_names(lambda: torch.zeros(1).type(torch.float64))
    assert convert().dtype is torch.float64


@pytest.mark.parametrize("module", [clip_grads, optimizer])
def test_clipping_works_and_leaves_no_trace(module):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    original = torch.Tensor.type
    module.clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    assert torch.Tensor.type is original
    with pytest.raises(TypeError):
        module.clip_grad_by_total_norm_fp32(None, max_norm=1.0, total_norm=5.0)
    assert torch.Tensor.type is original
    assert parameter.data.type() == "torch.FloatTensor"


def test_nothing_is_installed_where_a_gpu_is_available():
    script = """
import torch
torch.cuda.is_available = lambda: True
from helixpipe.megatron_adapter import cpu_backend
before = torch.zeros, torch.empty_like, torch.Tensor.to, torch.Tensor.cuda, torch.cuda.current_device
assert cpu_backend.install() is False
assert before == (
    torch.zeros, torch.empty_like, torch.Tensor.to, torch.Tensor.cuda, torch.cuda.current_device
)
torch.cuda.is_available = lambda: False
assert cpu_backend.install() is True
assert before[0] is not torch.zeros
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)
