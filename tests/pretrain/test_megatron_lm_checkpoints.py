"""Checkpoints of Megatron-LM's program load here: weights and states bit by bit, or a line that says why not.

Tensors have the same names in both programs, so one of theirs is made of one of ours by putting what
Megatron-LM says of its job in the place of what this program says.
"""

import argparse
import shutil
from enum import Enum
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from test_resume_state import assert_same, learned
from training_worker import Snapshot, run_cases, small_model

from megatron.pretrain.checkpoint.common_state import arguments_in, read_common
from megatron.pretrain.checkpoint.files import LINEAGE, MANIFEST

LAYOUT = "--pipeline-model-parallel-size 2"
ITERATION, SAMPLES = 2, 8


class Backend(Enum):
    """An object among the arguments whose class this program does not know."""

    FLASH = 1


def as_theirs(ours, root, name, drop=(), form=None, **changes):
    """A checkpoint as Megatron-LM saves it, with other arguments; the folder to load from."""
    folder = root / name.replace(" ", "_")
    shutil.copytree(ours, folder)
    (checkpoint,) = folder.glob("iter_*")
    for leftover in (MANIFEST, LINEAGE):
        (checkpoint / leftover).unlink()
    common = read_common(checkpoint)
    saved = arguments_in(common)
    del common["args"]
    saved |= {"attention_backend": Backend.FLASH} | changes
    args = argparse.Namespace(**{key: value for key, value in saved.items() if key not in drop})
    for of_ours in ("settings", "samples", "sums"):
        del common[of_ours]
    if form is not None:
        common["content_metadata"] = {"distrib_optim_sharding_type": form}
    torch.save(common if drop == "args" else common | {"args": args}, checkpoint / "common.pt")
    return folder


# fmt: off
CHANGES = {
    "layers": ({"num_layers": 8}, "was trained with --num-layers 8, this job has 4"),
    "vocabulary": ({"padded_vocab_size": 512}, "--padded-vocab-size 512, this job has 384"),
    "groups": ({"group_query_attention": True, "num_query_groups": 1},
               "--num-query-groups 1, this job has 2"),
    "positions": ({"max_position_embeddings": 64}, "--max-position-embeddings 64, this job has 32"),
    "epsilon": ({"norm_epsilon": None, "layernorm_epsilon": 1e-6},
                "--norm-epsilon 1e-06, this job has 1e-05"),
    "experts": ({"num_experts": 8}, "a model with --num-experts 8, which is not read from checkpoints of"),
    "heads of tokens": ({"mtp_num_layers": 1}, "a model with --mtp-num-layers 1"),
    "sharded": ({"use_distributed_optimizer": True},
                "--use-distributed-optimizer True, this job has False"),
    "no states": ({"no_save_optim": True}, "no optimizer states; load the weights alone"),
    "no arguments": ({"drop": "args"}, "does not say what it was trained with"),
}
# fmt: on
# Unsaid by older or newer releases, or said in another way.
ALIKE = {
    "form of 0.19": {"norm_epsilon": None, "layernorm_epsilon": 1e-5},
    "groups without attention": {"group_query_attention": False, "num_query_groups": 1},
    "biases everywhere": {"add_qkv_bias": True},
    "without newer ones": {"drop": ("add_qkv_bias", "rotary_percent", "kv_channels")},
}


def outcomes(root):
    """What each job came to: with changed arguments, and loading in every way."""
    common = small_model(root)
    jobs = {"ours": f"--save {root}/ours --save-interval {ITERATION}"}
    by_rank = run_on_ranks(2, run_cases, [(f"{LAYOUT} {jobs['ours']}", Snapshot(3))], 1, 2, common)
    found = {"ours": [rank[0] for rank in by_rank]}
    last = root / "ours" / "iter_0000003"
    shutil.rmtree(last)
    (root / "ours" / "latest_checkpointed_iteration.txt").write_text(f"{ITERATION}")
    theirs = as_theirs(root / "ours", root, "theirs")
    jobs = {
        "theirs": f"--load {theirs}",
        "under helix": f"--load {theirs} --pipeline-schedule helix --num-fold 1",
        "weights": f"--load {theirs} --no-load-optim",
        "anew": f"--load {theirs} --finetune",
        "anew from ours": f"--load {root}/ours --finetune --lr 1e-3",
        "pretrained": f"--pretrained-checkpoint {theirs}",
        "other rates": f"--load {theirs} --lr 6e-3 --adam-beta1 0.5",
        "other rates of ours": f"--load {root}/ours --lr 6e-3 --allow-changed lr",
        "into theirs": f"--load {theirs} --save {theirs}",
    }
    for name, (changes, _) in CHANGES.items():
        jobs[name] = f"--load {as_theirs(root / 'ours', root, name, **changes)}"
    for name, changes in ALIKE.items():
        jobs[name] = f"--load {as_theirs(root / 'ours', root, name, **changes)} --train-iters {ITERATION}"
    form = as_theirs(root / "ours", root, "form", form="dp_reshardable", use_distributed_optimizer=True)
    jobs["form"] = f"--load {form} --use-distributed-optimizer"
    damaged = as_theirs(root / "ours", root, "damaged")
    shard = next(damaged.glob("iter_*/__1_0.distcp"))
    content = bytearray(shard.read_bytes())
    for place in range(0, len(content), 997):
        content[place] ^= 1
    shard.write_bytes(content)
    jobs["damaged"] = f"--load {damaged}"
    begin_anew = {name for name, words in jobs.items() if "--finetune" in words or "--pretrained" in words}
    cases = [
        (f"{LAYOUT} {words}", Snapshot(1 if name in begin_anew else ITERATION + 1))
        for name, words in jobs.items()
    ]
    by_rank = run_on_ranks(2, run_cases, cases, 1, 2, common)
    return found | {name: [rank[i] for rank in by_rank] for i, name in enumerate(jobs)}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return outcomes(Path(tmp_path_factory.mktemp("checkpoints")))


def states(outcome):
    return learned([rank["seen"] for rank in outcome])


def weights_of(outcome):
    return {(name, kind): value for (name, kind), value in states(outcome).items() if kind == "weight"}


def said(outcome):
    return "\n".join(line for rank in outcome for line in rank["lines"])


@pytest.mark.parametrize("name", ["theirs", "under helix"])
def test_weights_and_states_come_back_bit_by_bit(found, name):
    assert {rank["code"] for rank in found[name]} == {0}, found[name]
    assert_same(states(found[name]), states(found["ours"]))
    assert f"going on from iteration {ITERATION}" in said(found[name])
    assert "at sample 0 of another order" in said(found[name])
    assert f"consumed samples: {SAMPLES + 4} " in said(found[name])


def test_weights_alone(found):
    """The optimizer begins anew, and iterations and samples go on."""
    assert_same(states(found["weights"]), weights_of(found["ours"]))
    assert f"going on from iteration {ITERATION}" in said(found["weights"])


@pytest.mark.parametrize("name", ["anew", "anew from ours", "pretrained"])
def test_weights_alone_from_the_start(found, name):
    assert {rank["code"] for rank in found[name]} == {0}, found[name]
    assert_same(states(found[name]), weights_of(found["ours"]))
    assert "starting from the weights of" in said(found[name])
    assert "consumed samples: 12 " in said(found[name])


@pytest.mark.parametrize(("name", "rate"), [("theirs", 1e-3), ("other rates", 2e-3),
                                            ("other rates of ours", 2e-3)])  # fmt: skip
def test_rates_are_those_of_this_job(found, name, rate):
    """A third of what is given, in the last of three iterations."""
    assert f"learning rate: {rate:.6E}" in said(found[name])


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_fit_is_refused_on_every_rank(found, name):
    for rank in found[name]:
        assert rank["code"] == 3
        assert CHANGES[name][1] in rank["error"]
        assert "\n" not in rank["error"]


@pytest.mark.parametrize("name", ALIKE)
def test_what_is_said_in_another_way_fits(found, name):
    assert {rank["code"] for rank in found[name]} == {0}, found[name]


def test_states_that_no_other_layout_reads_are_refused(found):
    for rank in found["form"]:
        assert "the form dp_reshardable" in rank["error"]
        assert "--dist-ckpt-optim-fully-reshardable there, or load the weights alone" in rank["error"]


def test_damage_is_found_before_a_weight_is_used(found):
    for rank in found["damaged"]:
        assert (rank["code"], rank["unchanged"]) == (3, True)
        assert "__1_0.distcp" in rank["error"]


def test_nothing_is_saved_among_theirs(found):
    for rank in found["into theirs"]:
        assert "of another program" in rank["error"]
