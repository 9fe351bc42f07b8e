"""Megatron's options in training runs: each does what it does there."""

from __future__ import annotations

import json
import re

import pytest
import torch
from ranks import run_on_ranks
from training_worker import Fault, run_cases, small_model

LINE = re.compile(r"iteration +(\d+)/.*learning rate: (\S+) .*lm loss: (\S+) .*grad norm: (\S+)")


class Watch(Fault):
    """Sees zeros of the gradient, the norm of the weights, and whether bits have to be the same."""

    def on_gradients(self, state):
        parameters = [parameter for chunk in state.model for parameter in chunk.parameters()]
        zeros = sum(int((parameter.main_grad == 0).sum()) for parameter in parameters)
        norm = float(sum(parameter.data.double().square().sum() for parameter in parameters).sqrt())
        self.seen.append((zeros, norm, torch.are_deterministic_algorithms_enabled()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def outcomes(folder):
    """What each command line came to, by its name."""
    cases = {
        "plain": "",
        "interval": f"--exit-interval 2 --save {folder}/a --use-mcore-models --distributed-backend nccl "
        "--attention-dropout 0 --hidden-dropout 0 --eval-iters 0",
        "resumed": f"--exit-interval 2 --save {folder}/a --load {folder}/a",
        "minutes": f"--exit-duration-in-mins 1e-6 --save {folder}/b",
        "samples": "--train-samples 14",
        "decoupled": "--decoupled-lr 9e-3",
        "norms": "--log-params-norm --log-num-zeros-in-grad",
        "bf16": "--bf16 --log-params-norm",
        "bf16 sums": "--bf16 --grad-reduce-in-bf16",
        "fp16": f"--fp16 --initial-loss-scale 65536 --save {folder}/fp16 --save-interval 2",
        "fp16 resumed": f"--fp16 --initial-loss-scale 65536 --load {folder}/fp16 --train-iters 4",
        "fp16 overflow": "--fp16 --initial-loss-scale 1e15 --hysteresis 1",
        "fp16 constant": "--fp16 --loss-scale 512 --accumulate-allreduce-grads-in-fp32",
        "throughput": f"--log-throughput --trace-dir {folder}/trace",
        "unfused": "--attention-backend unfused",
        "core": "--attention-backend unfused --pipeline-schedule helix",
        "qkv": "--attention-backend unfused --pipeline-schedule helix --attention-range qkv",
        "block": "--attention-backend local --pipeline-schedule helix --attention-range block",
        "flash": "--attention-backend flash",
        "dropout": "--attention-dropout 0.5",
        "helix dropout": "--attention-dropout 0.5 --pipeline-schedule helix --attention-range block",
        "deterministic": "--deterministic-mode",
    }
    iterations, common = "--train-iters 3", small_model(folder)
    lines = [line if "--train-samples" in line else f"{iterations} {line}" for line in cases.values()]
    common = common.replace(iterations, "")
    found = run_on_ranks(1, run_cases, [(line, Watch()) for line in lines], 1, 1, common)[0]
    return dict(zip(cases, found, strict=True))


def iterations(outcome):
    """Learning rate, loss and norm by iteration."""
    found = [LINE.search(line) for line in outcome["lines"]]
    return {int(match[1]): tuple(map(float, match.groups()[1:])) for match in found if match}


def test_every_run_ends_well(outcomes):
    assert {name: (o["code"], o["error"]) for name, o in outcomes.items()} == dict.fromkeys(outcomes, (0, ""))


def test_an_interval_ends_a_job_with_a_checkpoint(outcomes, folder):
    assert list(iterations(outcomes["interval"])) == [1, 2]
    assert any(line.startswith("stopped by --exit-interval 2 after iteration 2: the same command with --load")
               for line in outcomes["interval"]["lines"])  # fmt: skip
    assert iterations(outcomes["resumed"]) == {3: iterations(outcomes["plain"])[3]}


def test_minutes_end_a_job(outcomes, folder):
    assert list(iterations(outcomes["minutes"])) == [1]
    assert (folder / "b" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"


def test_flags_that_change_nothing_are_listed(outcomes):
    note = "accepted, but change nothing here: --use-mcore-models, --distributed-backend"
    assert note in outcomes["interval"]["lines"]
    assert not any(line.startswith("accepted") for line in outcomes["plain"]["lines"])


def test_samples_are_whole_batches(outcomes):
    """14 samples are 3 batches of 4; the rate decays over all 14."""
    found, plain = iterations(outcomes["samples"]), iterations(outcomes["plain"])
    assert list(found) == [1, 2, 3]
    assert found[3][0] == pytest.approx(3e-3 * (1 - 8 / 14), rel=1e-6)
    assert plain[3][0] == pytest.approx(3e-3 * (1 - 8 / 12), rel=1e-6)


def test_the_embedding_has_a_rate_of_its_own(outcomes):
    found, plain = iterations(outcomes["decoupled"]), iterations(outcomes["plain"])
    assert [row[0] for row in found.values()] == [row[0] for row in plain.values()]
    assert found[1][1:] == plain[1][1:]
    assert found[2][1] != plain[2][1]


def values(outcome, name):
    return [float(line.split(f"{name}: ")[1].split()[0]) for line in outcome["lines"] if f"{name}: " in line]


def test_norms_are_logged(outcomes):
    assert iterations(outcomes["norms"]) == iterations(outcomes["plain"])
    norms, zeros = values(outcomes["norms"], "params norm"), values(outcomes["norms"], "num zeros")
    assert len(norms) == len(zeros) == 3
    assert norms == pytest.approx(values(outcomes["bf16"], "params norm"), rel=1e-3)
    seen = outcomes["norms"]["seen"]
    assert [count for count, _, _ in seen] == zeros
    # Before the second step the weights are those after the first.
    assert [norm for _, norm, _ in seen][1:] == pytest.approx(norms[:-1], abs=1e-3)


def test_throughput_and_the_time_that_is_left_are_told(outcomes):
    assert len(values(outcomes["throughput"], r"throughput per GPU (TFLOP/s/GPU)")) == 3
    assert values(outcomes["plain"], "throughput per GPU (TFLOP/s/GPU)") == []
    left = [
        re.search(r" \| time to finish: \d+:\d\d:\d\d$", line) is not None
        for line in outcomes["plain"]["lines"]
        if " iteration " in line
    ]
    assert left == [True, True, False]


def test_arguments_are_written_beside_timelines(outcomes, folder):
    arguments = json.loads((folder / "trace" / "arguments.json").read_text())
    assert arguments["log_throughput"] is True
    assert arguments["trace_dir"] == str(folder / "trace")


def test_half_precision_trains_with_scaled_losses(outcomes):
    plain = iterations(outcomes["plain"])
    for name in ("fp16", "fp16 constant"):
        found = iterations(outcomes[name])
        assert [row[1] for row in found.values()] == pytest.approx([r[1] for r in plain.values()], rel=2e-3)
    assert values(outcomes["fp16"], "loss scale") == [65536] * 3
    assert values(outcomes["fp16 constant"], "loss scale") == [512] * 3


def test_an_overflow_leaves_an_iteration_out(outcomes):
    """The weights and the learning rate stay, and the scale is halved."""
    lines = [line for line in outcomes["fp16 overflow"]["lines"] if "loss scale" in line]
    assert all("skipped: yes" in line and "grad norm: n/a" in line for line in lines)
    assert values(outcomes["fp16 overflow"], "loss scale") == pytest.approx([1e15, 5e14, 2.5e14], rel=1e-6)
    assert values(outcomes["fp16 overflow"], "learning rate") == [3e-3] * 3
    assert outcomes["fp16 overflow"]["unchanged"]


def test_the_loss_scale_is_saved(outcomes):
    found = outcomes["fp16 resumed"]
    assert list(iterations(found)) == [4]
    assert values(found, "loss scale") == [65536]
    assert iterations(outcomes["fp16"])[3][1] != iterations(found)[4][1]


def test_gradients_in_bfloat16_are_rounded(outcomes):
    with_fp32, without = iterations(outcomes["bf16"]), iterations(outcomes["bf16 sums"])
    assert with_fp32[1][1] == without[1][1]
    assert with_fp32[3][1] != without[3][1]
    assert with_fp32[3][1] == pytest.approx(without[3][1], rel=0.02)


def test_unfused_attention_has_dropout(outcomes):
    plain, unfused = iterations(outcomes["plain"]), iterations(outcomes["unfused"])
    for name in ("unfused", "dropout", "helix dropout"):
        assert (
            "attention: unfused (Megatron's own, holds the score of each pair of tokens)"
            in (outcomes[name]["lines"])
        )
    for iteration, row in plain.items():
        # fp32 sums in another order.
        assert unfused[iteration] == pytest.approx(row, rel=1e-4)
        for attention_range in ("core", "qkv", "block"):
            assert iterations(outcomes[attention_range])[iteration] == pytest.approx(row, rel=1e-4)
    for name in ("dropout", "helix dropout"):
        assert iterations(outcomes[name])[1][1] != pytest.approx(plain[1][1], rel=1e-6)


def test_a_family_of_backends_is_taken(outcomes):
    assert "attention: aten-cpu" in outcomes["flash"]["lines"]
    assert iterations(outcomes["flash"]) == iterations(outcomes["plain"])


def test_bits_are_asked_to_be_the_same(outcomes):
    assert iterations(outcomes["deterministic"]) == iterations(outcomes["plain"])
    assert all(is_on for _, _, is_on in outcomes["deterministic"]["seen"])
    assert not any(is_on for _, _, is_on in outcomes["plain"]["seen"])
