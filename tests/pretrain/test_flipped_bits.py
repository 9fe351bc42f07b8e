"""One bit that changes while every number stays finite and there is one replica: found and named."""

from __future__ import annotations

import pytest
import torch
from ranks import run_on_ranks
from training_worker import Fault, FlippedCopy, FlippedStates, WrongOnce, run_cases, small_model

from megatron.pretrain.checkpoint.sums import bit_sum, differing

TWICE = "--check-layers-every 1"
LAYOUTS = {"1f1b": "--pipeline-schedule 1f1b", "helix": "--pipeline-schedule helix"}
MODULE = "decoder.layers.0.mlp.linear_fc1"
# Under helix it runs with the layer after it.
RANK = {"1f1b": 0, "helix": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_a_sum_depends_on_bits_alone(dtype):
    tensor = torch.randn(64, 3, generator=torch.Generator().manual_seed(1)).mul(50).to(dtype)
    whole = int(bit_sum(tensor))
    assert int(bit_sum(tensor.t())) == whole
    assert (sum(int(bit_sum(part)) for part in tensor.split(7)) - whole) % 2**64 == 0
    if dtype is torch.bool:
        return
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    for bit in range(8 * tensor.element_size() - 1):
        flipped = tensor.clone()
        flipped.view(-1).view(width)[5] ^= 1 << bit
        assert int(bit_sum(flipped)) != whole


def test_numbers_that_are_not_equal_to_themselves_have_sums():
    assert int(bit_sum(torch.tensor([torch.nan]))) == int(bit_sum(torch.tensor([torch.nan])))


def test_a_tensor_that_only_one_side_has_differs():
    assert differing({"a": 1, "b": 2}, {"a": 1, "c": 2}) == ["b", "c"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By case, of two pipeline ranks."""
    common = small_model(tmp_path_factory.mktemp("corpus"))
    good, bad = tmp_path_factory.mktemp("good"), tmp_path_factory.mktemp("bad")
    cases = {
        "saved": (f"--save {good} --async-save", Fault()),
        "flipped, saved": (f"--save {bad} --async-save", FlippedCopy(1)),
        "whole, loaded": (f"--load {good} --train-iters 4", Fault()),
        "flipped, loaded": (f"--load {bad} --train-iters 4", Fault()),
        "loaded, flipped": (f"--load {good} --train-iters 4", FlippedStates(1)),
        **{f"{name}, once": (layout, Fault()) for name, layout in LAYOUTS.items()},
        **{f"{name}, twice": (f"{layout} {TWICE}", Fault()) for name, layout in LAYOUTS.items()},
        **{
            f"{name}, wrong {every}": (
                f"{layout} --check-layers-every {every}",
                WrongOnce(MODULE, RANK[name]),
            )
            for name, layout in LAYOUTS.items()
            for every in (1, 2)
        },
    }
    line = f"{common} --num-layers 2 --pipeline-model-parallel-size 2"
    by_rank = run_on_ranks(2, run_cases, list(cases.values()), 1, 2, line)
    return {name: [found[i] for found in by_rank] for i, name in enumerate(cases)}


def codes(outcomes):
    return [outcome["code"] for outcome in outcomes]


def test_a_bit_that_changes_on_the_way_to_disk_is_noticed_when_it_is_loaded(outcomes):
    assert codes(outcomes["saved"]) == codes(outcomes["whole, loaded"]) == [0, 0]
    assert codes(outcomes["flipped, saved"]) == [0, 0]
    assert codes(outcomes["flipped, loaded"]) == [3, 3]
    (said,) = {outcome["error"] for outcome in outcomes["flipped, loaded"]}
    assert "has another sum than when it was saved, and its files are whole: a bit changed" in said


def test_a_bit_that_changes_on_the_way_from_disk_is_noticed(outcomes):
    assert codes(outcomes["loaded, flipped"]) == [3, 3]
    (said,) = {outcome["error"] for outcome in outcomes["loaded, flipped"]}
    assert ": optimizer.state.exp_avg." in said


def losses(outcome):
    return [line.split("lm loss: ")[1].split(" |")[0] for line in outcome["lines"] if "lm loss: " in line]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_computation_changes_nothing(outcomes, layout):
    once, twice = outcomes[f"{layout}, once"], outcomes[f"{layout}, twice"]
    assert codes(once) == codes(twice) == [0, 0]
    assert losses(once[0]) == losses(twice[0])
    assert len(losses(once[0])) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_wrong_once_is_named(outcomes, layout):
    caught = [found for every in (1, 2) if codes(found := outcomes[f"{layout}, wrong {every}"]) == [6, 6]]
    # Layers take turns: in iteration 2 it is this one's in one of the two.
    assert len(caught) == 1
    (said,) = {outcome["error"] for outcome in caught[0]}
    assert said.startswith(
        f"iteration 2: 1 numbers of the output of {MODULE} in micro batch 0 were others when computed again "
        f"on rank {RANK[layout]} (stage {RANK[layout]}, host "
    )
    assert said.endswith("the optimizer has not stepped")
    assert all(outcome["unchanged"] for outcome in caught[0])
