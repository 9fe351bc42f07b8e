"""Helix inside a program that knows nothing of it: the same losses, on the rank where the program reads them.

Programs for Megatron read losses on the last pipeline rank; a helix computes them on the first, or on all.
"""

from functools import partial

import pytest
from megatron.core.transformer import TransformerConfig
from megatron_lm_worker import CASE, compare, refusal_of_shared_sequences, refusals
from models import Case
from ranks import run_on_ranks

COMMANDS = (
    "--pipeline-schedule helix",
    "--pipeline-schedule helix --attention-range block --head-placement spread",
    "--pipeline-schedule helix --num-fold 1 --round-order interlocked --split-weight-gradients "
    "--recompute-levels none",
    "--pipeline-schedule zb-h1",
    "--pipeline-schedule zb-v",
    "--pipeline-schedule dualpipe-v",
    "--pipeline-schedule sliced-helix --num-fold 3",
    "--pipeline-schedule seq1f1b",
    "--pipeline-schedule seq1f1b --num-slices 3",
    "--pipeline-schedule sliced-helix --head-placement spread --resend-context --loss-chunk-size 5 "
    "--attention-range block",
)


@pytest.fixture(scope="module")
def losses():
    return run_on_ranks(2, compare, COMMANDS)


@pytest.fixture(scope="module")
def refused():
    return run_on_ranks(2, refusals)


def assert_equal(ours, stock):
    for found, expected in ((ours.trained, stock.trained), (ours.evaluated, stock.evaluated)):
        for (loss, tokens), (wanted, count) in zip(found, expected, strict=True):
            # Sums over a micro batch in fp32.
            assert loss == pytest.approx(wanted, rel=1e-6)
            assert tokens == count


@pytest.mark.parametrize("command", COMMANDS)
def test_losses_of_every_micro_batch_are_megatrons_and_on_the_last_rank(losses, command):
    first, last = (rank[command] for rank in losses)
    stock = losses[1][""]
    assert (first.trained, first.evaluated) == ([], [])
    assert len(last.trained) == len(stock.trained) == CASE.num_microbatches
    assert_equal(last, stock)


def test_switched_off_everything_is_megatrons_again(losses):
    for rank in losses:
        assert rank["after"] == rank[""]


@pytest.mark.skipif(not hasattr(TransformerConfig, "use_mup"), reason="megatron-core has it since 0.17")
def test_factors_of_mup_are_megatrons():
    factors = {"use_mup": True, "mup_embedding_mult": 2.0, "softmax_scale": 0.2, "mup_output_mult": 0.25}
    commands = ("helix --loss-chunk-size 5", "helix --attention-range block --head-placement spread",
                "sliced-helix --num-fold 3", "seq1f1b", "zb-h1")  # fmt: skip
    lines = [f"--pipeline-schedule {command}" for command in commands]
    _, last = run_on_ranks(2, partial(compare, **factors), lines)
    for line in lines:
        assert_equal(last[line], last[""])


SHARED = Case(pp=2, cp=2)


@pytest.mark.slow
def test_ranks_that_share_sequences_have_megatrons_losses_of_their_parts():
    """Under Megatron's own schedule with the same attention: its own needs Transformer Engine for that."""
    commands = ("helix", "helix --attention-range block --head-placement spread", "zb-h1", "zb-v", "v-half")
    lines = [f"--pipeline-schedule {command}" for command in commands]
    found = run_on_ranks(SHARED.world_size, compare, lines, SHARED)
    for line in lines:
        # Two ranks of a pipeline stage have two parts of the same sequences.
        for first, last in ((found[0], found[2]), (found[1], found[3])):
            assert (first[line].trained, first[line].evaluated) == ([], [])
            assert_equal(last[line], last[""])
    assert found[2][""].trained != found[3][""].trained


@pytest.mark.slow
def test_schedules_that_cut_sequences_share_none():
    for schedule in ("seq1f1b", "sliced-helix"):
        line = f"--pipeline-schedule {schedule}"
        for message in run_on_ranks(SHARED.world_size, refusal_of_shared_sequences, line, SHARED):
            assert message.startswith(f"the {schedule} schedule cuts sequences itself; leave --context-par")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("stock", "call helixpipe.megatron_lm.enable() in the script's first line"),
        ("stock schedule", "call helixpipe.megatron_lm.enable() in the script's first line"),
        ("config", "does not know qk_l2_norm=True of TransformerConfig"),
        ("experts", "does not know num_moe_experts=2"),
        ("argument", "does not know fp16_lm_cross_entropy=True of GPTModel"),
        ("spec", "this model's layer spec is another"),
        ("groups", "pg_collection.pp has other ranks"),
        ("communicator", "p2p_communicator has other ranks"),
        ("sizes", "not on 4 ranks with 1"),
        ("chunks", "not on 2 ranks with 2"),
        ("one chunk", "built with vp_stage=0 and vp_stage=1"),
        ("third chunk", "built with vp_stage=0 and vp_stage=1"),
        ("chunks of one", "with two model chunks each, not on 2 ranks with 1"),
        ("tied", "add --untie-embeddings-and-output-weights"),
        ("layers that differ", "one ModuleSpec for all"),
        ("uneven stages", "leave --num-layers-in-first-pipeline-stage out"),
        ("experts in chunks", "does not support experts in this program"),
        ("virtual stages", "makes two model chunks on each rank by itself"),
    ],
)
def test_what_would_change_numbers_in_silence_is_refused_on_every_rank(refused, what, words):
    for rank in refused:
        assert words in rank[what]


def test_a_sentinel_is_told_of_steps_and_their_operations(refused):
    for rank in refused:
        told = rank["told"]
        # Once, at the first step.
        assert [tuple(address) for address in told[:1]] == [(["here"], 1, "token")]
        assert told[1] == [0, 1]
        phases = [entry for entry in told[2:] if isinstance(entry, tuple)]
        assert phases == [("step", 1), ("between steps", None), ("evaluate", 1), ("between steps", None)]
        evaluation = told[told.index(("evaluate", 1)) + 1 : -1]
        computed = [text for text in rank["evaluation"] if "SEND" not in text and "RECV" not in text]
        assert [text for text in evaluation if text in computed] == computed


def test_scaled_rotary_positions_are_megatrons(refused):
    assert [rank["scaled angles"] for rank in refused] == ["", ""]


def test_groups_that_are_megatrons_own_are_accepted(refused):
    assert [rank["equal groups"] for rank in refused] == ["", ""]
