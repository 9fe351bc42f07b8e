"""tools/checkpoint.py: facts of checkpoints in every form, and every kind of damage is found."""

import argparse
import json
import os
import pickle
import subprocess
import sys
from enum import Enum

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sources import ROOT
from torch.distributed.checkpoint.metadata import Metadata

from megatron.pretrain.checkpoint.common_state import Placeholder, arguments_in, read_common
from megatron.pretrain.checkpoint.files import MANIFEST, TRACKER, digest
from megatron.pretrain.checkpoint.inspection import facts, faults, find_checkpoint
from megatron.pretrain.checkpoint.publishing import publish, start_saving
from megatron.pretrain.checkpoint.safe_pickle import find_unsafe_content

SHARD = "__0_0.distcp"
WEIGHT = torch.arange(64, dtype=torch.float32).reshape(4, 16)
SETTINGS = {"num_layers": 4, "hidden_size": 16, "padded_vocab_size": 128}


class Backend(Enum):
    """An object that a script of somebody's has put into its arguments."""

    FLASH = 1


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write(folder, common, form):
    """What Megatron's torch_dist writes: up to 0.18 with a file of its own for the common state."""
    state = {"decoder.weight": WEIGHT, "optimizer.state.exp_avg.decoder.weight": WEIGHT.bfloat16()}
    if form == "object":
        state["common_state/shard_0_1"] = [common]
    else:
        torch.save(common, folder / "common.pt")
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


@pytest.fixture(params=["file", "object"])
def theirs(request, tmp_path):
    """As Megatron-LM saves it."""
    folder = tmp_path / "iter_0000010"
    folder.mkdir()
    args = argparse.Namespace(**SETTINGS, consumed_train_samples=80, attention_backend=Backend.FLASH)
    write(folder, {"args": args, "iteration": 10}, request.param)
    (tmp_path / TRACKER).write_text("10")
    return folder


@pytest.fixture
def ours(tmp_path):
    """As our own program saves it."""
    folder = start_saving(tmp_path, 10)
    common = {"settings": SETTINGS, "iteration": 10, "samples": {"consumed_samples": 80}}
    write(folder, common, "file")
    digests = {path.name: digest(path) for path in folder.iterdir()}
    return publish(tmp_path, 10, digests, job="test", previous=None, keep=None).saved.folder


def test_facts_of_theirs(theirs):
    check_facts(theirs, "another program")


def test_facts_of_ours(ours):
    check_facts(ours, "HelixPipe")


def check_facts(folder, saved_by):
    assert find_checkpoint(folder.parent) == find_checkpoint(folder) == folder
    found = dict(facts(folder))
    assert found["saved by"].startswith(saved_by)
    wanted = {
        "iteration": 10, "consumed samples": 80, "weights": 64, "type of weights": "float32",
        "elements of optimizer states": 64, "type of optimizer states": "bfloat16", "num-layers": 4,
    }  # fmt: skip
    assert found.items() >= wanted.items()
    assert found["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert faults(folder) == []


def test_objects_of_unknown_classes_are_not_built(theirs):
    args = arguments_in(read_common(theirs))
    assert args["num_layers"] == 4
    assert isinstance(args["attention_backend"], Placeholder)


@pytest.mark.parametrize("form", ["file", "object"])
def test_no_code_runs(tmp_path, form):
    canary = tmp_path / "ran"
    folder = tmp_path / "iter_0000010"
    folder.mkdir()
    write(folder, {"args": argparse.Namespace(bomb=Bomb(canary))}, form)
    with pytest.raises(ValueError, match="more than plain data"):
        dict(facts(folder))
    (line,) = faults(folder)
    assert "more than plain data" in line
    file = "common.pt" if form == "file" else SHARD
    assert find_unsafe_content(folder).startswith(f"{folder / file} holds more than plain data")
    assert not canary.exists()
    if form == "file":
        torch.load(folder / "common.pt", weights_only=False)
        assert canary.exists()


def flip(folder):
    """One bit in the middle of a tensor."""
    content = bytearray((folder / SHARD).read_bytes())
    content[content.index(WEIGHT.numpy().tobytes()) + 130] ^= 1
    (folder / SHARD).write_bytes(content)


def rewrite_table(folder, change):
    table = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(table)))


def without_a_chunk(table):
    table.state_dict_metadata["decoder.weight"].chunks.clear()
    return table


def leading_outside(table: Metadata):
    for place in table.storage_data.values():
        place.relative_path = "../" + place.relative_path
    return table


DAMAGE = {
    "flipped": (flip, SHARD),
    "short": (lambda folder: os.truncate(folder / SHARD, 300), "300 bytes instead of"),
    "long": (lambda folder: (folder / SHARD).open("ab").write(b"x"), "bytes instead of"),
    "missing": (lambda folder: (folder / SHARD).unlink(), "missing"),
    "no table": (lambda folder: (folder / ".metadata").write_bytes(b"\x80"), ".metadata"),
    "no form": (lambda folder: (folder / "metadata.json").write_text("{"), "metadata.json"),
    "no chunk": (lambda folder: rewrite_table(folder, without_a_chunk), ".weight has 0 elements"),
    "outside": (lambda folder: rewrite_table(folder, leading_outside), "not a plain file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_of_theirs_is_found(theirs, name):
    damage, words = DAMAGE[name]
    damage(theirs)
    found = faults(theirs)
    assert any(words in line for line in found), found
    assert not [line for line in found if "\n" in line]


@pytest.mark.parametrize("name", [name for name in DAMAGE if name not in ("no chunk", "outside")])
def test_damage_of_ours_is_found(ours, name):
    damage, _ = DAMAGE[name]
    damage(ours)
    (line,) = faults(ours)
    assert str(ours) in line


def run(*arguments):
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/checkpoint.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_prints_a_line_each_and_ends_with_what_it_found(ours):
    finished = run("verify", ours.parent)
    assert (finished.returncode, finished.stdout) == (0, f"{ours} is whole\n")
    (ours / MANIFEST).write_text(json.dumps({}))
    finished = run("verify", ours)
    assert finished.returncode == 3
    (line,) = finished.stderr.splitlines()
    assert line.startswith("checkpoint: error: ")


@pytest.mark.parametrize("text", [None, "x", "7"])
def test_a_folder_without_a_checkpoint_is_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / TRACKER).write_text(text)
    with pytest.raises(ValueError, match=r"give ") as raised:
        find_checkpoint(tmp_path)
    assert "\n" not in str(raised.value)
