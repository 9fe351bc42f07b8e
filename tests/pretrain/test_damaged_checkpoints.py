"""Real checkpoints that are damaged or hostile: one line that names the file, before any weight is used."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import megatron.core
import pytest
import torch
from ranks import run_on_ranks
from test_checkpoint_files import Bomb, sealed
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from training_worker import Fault, KilledSave, run_cases, small_model

from megatron.pretrain.checkpoint.files import tracked, usable
from megatron.pretrain.checkpoint.megatron_lm import is_readable
from megatron.pretrain.checkpoint.safe_pickle import COMMON_FILE

SHARD = "__0_0.distcp"
# Since megatron-core 0.19 what it holds is among the shards.
COMMON = () if is_readable(Path("nowhere"), megatron.core.__version__) else (COMMON_FILE,)
FILES = (SHARD, "__0_1.distcp", ".metadata", *COMMON, "metadata.json")


def flip(name):
    def damage(folder, other, canary):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


def cut(folder, other, canary):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1])


def empty(folder, other, canary):
    (folder / SHARD).write_bytes(b"")


def delete(folder, other, canary):
    (folder / SHARD).unlink()


def add(folder, other, canary):
    (folder / "__9_0.distcp").write_bytes(b"stray")


def swap(folder, other, canary):
    assert (folder / SHARD).stat().st_size == (other / SHARD).stat().st_size
    shutil.copy(other / SHARD, folder / SHARD)


def cut_and_seal(folder, other, canary):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])
    sealed(folder)


def put_for_every_tensor(folder, content):
    """One pickle in the place of every tensor, optimizer states among them."""
    table = pickle.loads((folder / ".metadata").read_bytes())
    file = folder / "__9_0.distcp"
    torch.save(content, file)
    put = {"relative_path": file.name, "offset": 0, "length": file.stat().st_size}
    change_table(
        folder, {key: place if key.fqn.startswith("common_state/") else replace(place, **put)
                 for key, place in table.storage_data.items()},
    )  # fmt: skip


def bomb_in_states(folder, other, canary):
    put_for_every_tensor(folder, Bomb(canary))


def giant_tensor(folder, other, canary):
    """A view of one element as a billion."""
    put_for_every_tensor(folder, torch.zeros(1).expand(10**9))


def giant_table(folder, other, canary):
    table = pickle.loads((folder / ".metadata").read_bytes())
    for found in table.state_dict_metadata.values():
        if isinstance(found, TensorStorageMetadata):
            found.size = torch.Size([10**9])
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    sealed(folder)


def other_type(folder, other, canary):
    table = pickle.loads((folder / ".metadata").read_bytes())
    for found in table.state_dict_metadata.values():
        if isinstance(found, TensorStorageMetadata):
            found.properties.dtype = torch.bfloat16
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    sealed(folder)


def lead_to(name):
    def damage(folder, other, canary):
        table = pickle.loads((folder / ".metadata").read_bytes())
        change_table(
            folder,
            {key: replace(place, relative_path=name) for key, place in table.storage_data.items()},
        )

    return damage


def bomb_in_table(folder, other, canary):
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(canary)))
    sealed(folder)


def bomb_in_common(folder, other, canary):
    torch.save({"iteration": Bomb(canary)}, folder / COMMON_FILE)
    sealed(folder)


def change_table(folder, storage_data):
    table = pickle.loads((folder / ".metadata").read_bytes())
    table.storage_data = storage_data
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    sealed(folder)


CHECKSUM = "has another checksum than when it was saved: it is damaged or from another save"
NO_DATA = "holds more than plain data; do not use it"
# What is done to a folder, and the start of what is said of it, from its path on.
DAMAGE = {
    **{f"flipped {name}": (flip(name), f"/{name} {CHECKSUM}") for name in FILES},
    "flipped manifest": (flip("manifest.json"), ""),
    "cut": (cut, f"/{SHARD} has "),
    "empty": (empty, f"/{SHARD} has 0 bytes instead of "),
    "deleted": (delete, f"/{SHARD} is missing"),
    "stray": (add, "/__9_0.distcp does not belong there"),
    "swapped": (swap, f"/{SHARD} {CHECKSUM}"),
    "cut and sealed": (cut_and_seal, " cannot be loaded ("),
    "code in states": (bomb_in_states, " cannot be loaded ("),
    "code in table": (bomb_in_table, f"/.metadata {NO_DATA} ("),
    "code in common": (bomb_in_common, f"/{COMMON_FILE} {NO_DATA} ("),
    "giant tensor": (giant_tensor, " cannot be loaded ("),
    "giant table": (giant_table, " holds "),
    "type": (other_type, " holds "),
    "absolute": (lead_to("/etc/passwd"), f"/.metadata {NO_DATA} (it names '/etc/passwd', "),
    "outside": (lead_to(f"../iter_0000001/{SHARD}"), f"/.metadata {NO_DATA} (it names '../iter_0000001/"),
}  # fmt: skip


def place_of(root, case):
    return root / case.replace(" ", "_")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By damage: its folder, and what became of the job that was to go on from there."""
    common = small_model(tmp_path_factory.mktemp("corpus"))
    root = tmp_path_factory.mktemp("damaged")
    run_on_ranks(
        1, run_cases, [(f"--train-iters 2 --save-interval 1 --save {root / 'whole'}", Fault())], 1, 1, common
    )
    for name, (damage, _) in DAMAGE.items():
        shutil.copytree(root / "whole", root / name.replace(" ", "_"))
        damage(
            root / name.replace(" ", "_") / "iter_0000002",
            root / name.replace(" ", "_") / "iter_0000001",
            root / "canary",
        )
    cases = [(f"--load {root / name.replace(' ', '_')}", Fault()) for name in ("whole", *DAMAGE)]
    (outcomes,) = run_on_ranks(1, run_cases, cases, 1, 1, common)
    return root, dict(zip(("whole", *DAMAGE), outcomes, strict=True))


def test_without_damage_it_goes_on(found):
    assert (found[1]["whole"]["code"], found[1]["whole"]["error"]) == (0, "")


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_ends_in_one_line(found, case):
    root, outcomes = found
    outcome = outcomes[case]
    assert outcome["code"] == 3
    folder = place_of(root, case) / "iter_0000002"
    if case == "flipped manifest":
        # Wherever the bit is, it is one of the files that no longer fits.
        assert outcome["error"].startswith(f"{folder}/")
    else:
        assert outcome["error"].startswith(f"{folder}{DAMAGE[case][1]}"), outcome["error"]
    assert "\n" not in outcome["error"]
    assert not any("iteration 3" in line for line in outcome["lines"])


def test_no_code_ran_and_little_memory_was_taken(found):
    root, outcomes = found
    assert not (root / "canary").exists()
    assert outcomes["giant tensor"]["peak_bytes"] - outcomes["whole"]["peak_bytes"] < 400 << 20
    # The bomb is a live one.
    torch.load(Path(root) / "code_in_common" / "iter_0000002" / COMMON_FILE, weights_only=False)
    assert (root / "canary").exists()


POINTS = {
    "before a shard": [],
    "within a shard": [SHARD],
    "after the shards": [SHARD, "common.pt"],
    "before publishing": [SHARD, "common.pt", ".metadata", "metadata.json"],
    "before the tracker": [],
}


@pytest.mark.slow
def test_killed_at_any_point_of_a_save_it_goes_on_from_the_one_before(tmp_path):
    """Real processes that are really killed; the leftovers are ignored, and replaced by the next save."""
    common = small_model(tmp_path / "corpus") + " --save-interval 1"
    whole = tmp_path / "whole"
    run_on_ranks(1, run_cases, [(f"--save {whole} --metrics-jsonl {whole}.jsonl", Fault())], 1, 1, common)
    for point, files in POINTS.items():
        saved = place_of(tmp_path, point)
        options = f"--save {saved} --load {saved} --metrics-jsonl {saved}.jsonl"
        with pytest.raises(AssertionError, match="the process died"):
            run_on_ranks(1, run_cases, [(options, KilledSave(point))], 1, 1, common)
        left = saved / "iter_0000002.saving"
        # Renamed it is whole; the tracker still names the one before it.
        assert left.is_dir() == (point != "before the tracker")
        assert all((left / name).exists() for name in files)
        assert tracked(saved) == saved / "iter_0000001"
        ((outcome,),) = run_on_ranks(1, run_cases, [(options, Fault())], 1, 1, common)
        assert outcome["code"] == 0, outcome["error"]
        assert [path.name for path in usable(saved)] == [path.name for path in usable(whole)]
        assert not list(saved.glob("*.saving"))
        assert losses(saved) == losses(whole)


def losses(saved):
    return [json.loads(line)["lm_loss"] for line in Path(f"{saved}.jsonl").read_text().splitlines()]
