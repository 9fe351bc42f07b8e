"""Options of precision and fusion, as Megatron's configuration gets them."""

from __future__ import annotations

import os

import pytest
import torch

from helixpipe.data.prefix import DatasetInfo
from megatron.pretrain import model
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.precision import make_deterministic

MINIMAL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 8 --train-iters 10 --lr 1e-3 --data-path unused --transformer-impl local"
)
DATASET = DatasetInfo(
    prefix="unused", vocab_size=300, eod=0, num_documents=100, num_tokens=10_000, longest_document=500
)
SET_BY_US = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")


@pytest.fixture
def parse(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    return lambda more="": parse_arguments(f"{MINIMAL} {more}".split(), DATASET)


@pytest.fixture
def config_on_gpu(parse, monkeypatch):
    """The configuration where there are a GPU and apex."""
    monkeypatch.setattr(model, "has_apex_accumulation", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return lambda more="": model.build_config(parse(more))


@pytest.mark.parametrize(
    ("flag", "name", "before", "after"),
    [
        ("--cross-entropy-loss-fusion", "cross_entropy_loss_fusion", False, True),
        ("--cross-entropy-fusion-impl te", "cross_entropy_fusion_impl", "native", "te"),
        ("--no-gradient-accumulation-fusion", "gradient_accumulation_fusion", True, False),
        ("--deterministic-mode", "deterministic_mode", False, True),
        ("--fp16", "params_dtype", torch.float32, torch.float16),
        ("--bf16", "params_dtype", torch.float32, torch.bfloat16),
    ],
)
def test_megatrons_configuration_has_it(config_on_gpu, flag, name, before, after):
    assert getattr(config_on_gpu(), name) == before
    assert getattr(config_on_gpu(flag), name) == after


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("", True),
        ("--bf16", True),
        ("--bf16 --grad-reduce-in-bf16", False),
        ("--fp16", False),
        ("--fp16 --accumulate-allreduce-grads-in-fp32", True),
    ],
)
def test_gradients_are_summed_as_in_megatron(parse, flags, wanted):
    assert parse(flags).precision.reduces_in_fp32 is wanted


def test_deterministic_processes_say_so_to_their_libraries(parse, monkeypatch):
    for name in SET_BY_US:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    was_on = torch.are_deterministic_algorithms_enabled()
    try:
        make_deterministic()
        assert [os.environ[name] for name in SET_BY_US] == [":4096:8", "Ring", "0"]
        parse("--deterministic-mode")
    finally:
        torch.use_deterministic_algorithms(was_on)


@pytest.mark.parametrize(("name", "value"), [("NCCL_ALGO", "NVLS"), (SET_BY_US[2], "1")])
def test_an_environment_that_contradicts_is_refused(parse, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"--deterministic-mode does not go with {name}={value}; unset it"):
        parse("--deterministic-mode")
