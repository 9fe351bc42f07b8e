"""Numbers that are not finite or not equal are caught in their iteration, before the optimizer writes."""

from __future__ import annotations

import math
import re

import pytest
from ranks import run_on_ranks
from training_worker import BadModule, Fault, FlippedBit, run_cases, small_model

from helixpipe.reliability.loss_spikes import MIN_LOSSES, WINDOW, LossSpikes
from megatron.pretrain.health.diagnosis import Finding, is_finite, origin

HELIX = "--pipeline-model-parallel-size 2 --pipeline-schedule helix"
ONE_F_ONE_B = "--pipeline-model-parallel-size 2 --pipeline-schedule 1f1b"
INTERLEAVED = (
    "--pipeline-model-parallel-size 2 --pipeline-schedule interleaved "
    "--num-layers-per-virtual-pipeline-stage 1"
)
# The number within the stage, as Megatron counts.
SECOND_STAGE = "decoder.layers.1.mlp.linear_fc1"
NAN, INFINITE = math.nan, math.inf

# options, fault, words of the message in order
PIPELINE = {
    "a module under 1F1B": (
        ONE_F_ONE_B,
        BadModule(SECOND_STAGE, rank=1, micro_batch=2, value=NAN),
        ("the loss of micro batch 2 is nan on rank 1 (stage 1)", "the same and begins at the output of "
         "decoder.layers.3.mlp.linear_fc1 (forward, rank 1, stage 1, micro batch 2)"),
    ),
    "a module under helix": (
        HELIX,
        BadModule("decoder.layers.1.mlp.linear_fc1", micro_batch=1, value=NAN),
        ("the loss of micro batch 1 is nan on rank 0 (stage 0)", "begins at the output of "
         "decoder.layers.1.mlp.linear_fc1 (forward, rank ", ", micro batch 1)"),
    ),
    "a module under interleaving": (
        INTERLEAVED,
        BadModule("decoder.layers.0.mlp.linear_fc2", micro_batch=3, value=NAN),
        ("the loss of micro batch 3 is nan on rank 1", "begins at the output of decoder.layers.0"),
    ),
    "a gradient": (
        ONE_F_ONE_B,
        BadModule(SECOND_STAGE, rank=1, micro_batch=3, value=NAN, backward=True),
        ("the gradient of decoder.layers.3.", "is not finite on rank 1 (stage 1)", "the same and begins at "
         "the gradient of the output of ", "(backward, rank 1, stage 1, micro batch 3)"),
    ),
    "a gradient under helix": (
        HELIX,
        BadModule("decoder.layers.1.mlp.linear_fc1", micro_batch=3, value=INFINITE, backward=True),
        ("the gradient of decoder.layers.1.", "is not finite on rank "),
    ),
    "an infinite loss": (
        ONE_F_ONE_B,
        BadModule("output_layer", micro_batch=1, value=INFINITE),
        ("the loss of micro batch 1 is", "begins at the output of output_layer (forward, rank 1"),
    ),
    "a transient fault": (
        HELIX,
        BadModule("decoder.layers.0.mlp.linear_fc1", micro_batch=0, value=NAN, times=1),
        ("the loss of micro batch 0 is nan", "computed once more the step is finite: a transient fault",
         "which began at the output of decoder.layers.0.mlp.linear_fc2 (forward, rank ", ", micro batch 0)"),
    ),
    "a transient fault under 1F1B, with chunks": (
        f"{ONE_F_ONE_B} --mlp-chunk-size 10",
        BadModule("decoder.layers.0.self_attention.linear_qkv", rank=1, micro_batch=2, value=NAN, times=1),
        ("the loss of micro batch 2 is nan", "a transient fault, as of memory or a processor, which began at "
         "the output of decoder.layers.2.self_attention.linear_proj (forward, rank 1, stage 1, micro batch "),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def stopped(common):
    """The runs of ``PIPELINE`` on two ranks, and one without a fault."""
    cases = [(options, fault) for options, fault, _ in PIPELINE.values()]
    return run_on_ranks(2, run_cases, [*cases, (HELIX, Fault())], 1, 2, common)


@pytest.mark.parametrize("case", PIPELINE)
def test_not_finite_is_caught_and_named(stopped, case):
    index = list(PIPELINE).index(case)
    for rank in range(2):
        found = stopped[rank][index]
        assert found["code"] == 6
        position = 0
        for words in ("iteration 2: ", *PIPELINE[case][2], "the weights are those of iteration 1"):
            assert words in found["error"][position:], found["error"]
            position = found["error"].index(words, position)
        assert found["unchanged"]
    assert stopped[0][index]["error"] == stopped[1][index]["error"]


def test_a_run_without_faults_ends_well(stopped):
    for rank in range(2):
        assert (stopped[rank][-1]["code"], stopped[rank][-1]["error"]) == (0, "")
        assert not stopped[rank][-1]["unchanged"]


CHECK = "--pipeline-schedule helix --check-gradients-every"
REPLICAS = {
    "gradient": (f"{CHECK} 1", FlippedBit(1, "gradient"), "the gradient of "),
    "weight": (f"{CHECK} 2", FlippedBit(0, "weight"), "the weight "),
    "weight, sharded optimizer": (
        f"{CHECK} 1 --use-distributed-optimizer", FlippedBit(0, "weight"), "the weight "
    ),
    "not looked at": (f"{CHECK} 3", FlippedBit(0, "gradient"), ""),
    "no fault": (f"{CHECK} 1", Fault(), ""),
}  # fmt: skip


def test_replicas_that_differ_are_named(common):
    cases = [(options, fault) for options, fault, _ in REPLICAS.values()]
    found = run_on_ranks(2, run_cases, cases, 1, 1, common)
    for index, (name, (_, _, words)) in enumerate(REPLICAS.items()):
        for rank in range(2):
            code, error = found[rank][index]["code"], found[rank][index]["error"]
            if words:
                assert code == 6, name
                assert error.startswith(f"iteration 2: {words}"), error
                assert "differs between the data-parallel ranks 0, 1" in error
            elif name == "no fault":
                assert (code, error) == (0, "")


def test_the_finding_nearest_to_the_input_is_the_origin():
    def forward(rank, segment, micro_batch=1, inherited=False):
        return rank, Finding(micro_batch, False, segment, inherited, f"segment {segment}")

    backward = (0, Finding(1, True, -5, False, "segment 5"))
    assert origin([]) is None
    assert origin([forward(0, 3, inherited=True), forward(1, 2), backward])[0] == 1
    assert origin([backward, (1, Finding(1, True, -7, False, "segment 7"))])[1].where == "segment 7"
    assert origin([forward(0, 3, inherited=True), forward(2, 3)])[0] == 2


def test_what_is_finite():
    import torch

    good, bad = torch.ones(2), torch.tensor([1.0, NAN])
    assert is_finite((good, None, torch.tensor([1]), [good]))
    assert not is_finite((good, (bad,)))
    assert not is_finite(torch.tensor(-INFINITE))


def falling(count):
    return [6 * 0.99**step + 0.05 * ((step * 7) % 5 - 2) for step in range(count)]


def test_spikes_stand_out_from_a_falling_noisy_loss():
    spikes = LossSpikes()
    assert not any(spikes.check(loss) for loss in falling(200))
    usual = falling(200)[-1]
    text = spikes.check(usual + 6)
    assert re.match(rf"lm loss {usual + 6:.4f} is a spike: the last {WINDOW} have the median ", text)
    # The spike itself must not hide the next one.
    assert spikes.check(usual + 6)
    assert not spikes.check(usual)


def test_few_losses_low_losses_and_odd_ones_are_no_spikes():
    spikes = LossSpikes()
    assert not any(spikes.check(loss) for loss in [1.0] * (MIN_LOSSES - 1))
    assert not spikes.check(50.0)
    assert not spikes.check(0.1)
    assert not spikes.check(NAN)
    assert not spikes.check(1.04)
    assert spikes.check(1.06)
