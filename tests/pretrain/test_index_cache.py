"""Megatron's indices on disk: nodes with disks of their own, a shared one, and one that is read-only."""

from __future__ import annotations

import os
import shutil
import threading

import numpy as np
import pytest
import torch
from index_cache_worker import dataset_config, indices, indices_on_a_node
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from ranks import run_on_ranks

from helixpipe.data.prefix import dataset_paths
from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset
from helixpipe.reliability.exit_codes import DataError
from megatron.pretrain.data.index_cache import build_datasets
from megatron.pretrain.settings.arguments import parse_arguments

SAMPLES = [40, 4, 0]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = folder / "in.jsonl"
    text.write_text("".join(f'{{"text": "{chr(97 + i % 26) * (5 + 7 * i % 40)}"}}\n' for i in range(40)))
    prepare_dataset(PreparationOptions([str(text)], str(folder / "data"), tokenizer="byte"))
    return folder / "data"


def megatrons(prefix, cache):
    """The indices as Megatron builds them in one process."""
    parts = BlendedMegatronDatasetBuilder(
        GPTDataset, SAMPLES, lambda: True, dataset_config(prefix, cache)
    ).build()
    return [part and indices(part) for part in parts]


@pytest.fixture(scope="module")
def expected(original, tmp_path_factory):
    found = megatrons(original, tmp_path_factory.mktemp("megatron"))
    assert found[2] is None
    return found


@pytest.mark.parametrize("shares_cache", [False, True])
def test_every_node_has_the_indices(original, expected, tmp_path, shares_cache):
    """Two nodes of two ranks; copies made at different times; the last rank of each node reads no data."""
    nodes = []
    for node in range(2):
        (tmp_path / str(node)).mkdir()
        for path in dataset_paths(original):
            copy = shutil.copy(path, tmp_path / str(node))
            os.utime(copy, (1e9 + node, 1e9 + node))
        nodes += 3 * [str(tmp_path / str(node))]
    cache = str(tmp_path / "shared") if shares_cache else None
    results = run_on_ranks(6, indices_on_a_node, nodes, cache, (0, 1, 3, 4))
    for rank, (found, computed) in enumerate(results):
        assert found == ([None] * 3 if rank in (2, 5) else expected)
        # One writer on each disk; here both "nodes" are one host, which sees that they share the folder.
        writes = rank == 0 or (rank == 3 and not shares_cache)
        assert computed == (["train", "valid"] if writes else [])
    again = run_on_ranks(6, indices_on_a_node, nodes, cache, (0, 1, 3, 4))
    assert all(computed == [] for _, computed in again)
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_a_cache_that_cannot_be_written_is_named_on_all_ranks(original, tmp_path):
    nodes = []
    for node in range(2):
        (tmp_path / str(node)).mkdir()
        for path in dataset_paths(original):
            shutil.copy(path, tmp_path / str(node))
        nodes.append(str(tmp_path / str(node)))
    (tmp_path / "1" / "cache").write_text("in the way")
    for found, _ in run_on_ranks(2, indices_on_a_node, nodes, None, (0, 1)):
        assert found.startswith("rank 1 on ")
        assert "index cache cannot be written to cache (" in found
        assert "give a --data-cache-path" in found


def test_writers_at_the_same_time_leave_whole_files(original, expected, tmp_path):
    """As two nodes that share a folder do."""
    found = []

    def build():
        parts = build_datasets(dataset_config(original, tmp_path), SAMPLES, reads_data=True)
        found.append([part and indices(part) for part in parts])

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == 4 * [expected]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == 6 * [".npy"] + 2 * [".txt"]


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_an_interrupted_write_is_finished(original, expected, tmp_path, left):
    build_datasets(dataset_config(original, tmp_path), SAMPLES, reads_data=True)
    for path in sorted(tmp_path.glob("*train*"), key=lambda path: path.suffix == ".txt")[left:]:
        path.unlink()
    train, valid, _ = build_datasets(dataset_config(original, tmp_path), SAMPLES, reads_data=True)
    assert [indices(train), indices(valid)] == expected[:2]


def test_a_dataset_prepared_anew_has_indices_of_its_own(original, tmp_path):
    for path in dataset_paths(original):
        shutil.copy(path, tmp_path)
    before, *_ = build_datasets(dataset_config(tmp_path / "data", tmp_path / "c"), SAMPLES, reads_data=True)
    index = tmp_path / "data.idx"
    stat = index.stat()
    text = tmp_path / "in.jsonl"
    text.write_text("".join(f'{{"text": "{"x" * (60 - i)}"}}\n' for i in range(40)))
    options = PreparationOptions([str(text)], str(tmp_path / "data"), tokenizer="byte", overwrite=True)
    prepare_dataset(options)
    # A copy may keep any time; the size is the same as well.
    os.utime(index, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert index.stat().st_size == stat.st_size
    after, *_ = build_datasets(dataset_config(tmp_path / "data", tmp_path / "c"), SAMPLES, reads_data=True)
    assert not np.array_equal(before.sample_index, after.sample_index)


def test_a_read_only_cache_will_do_once_it_is_filled(original, expected, tmp_path, monkeypatch):
    build_datasets(dataset_config(original, tmp_path), SAMPLES, reads_data=True)

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    train, *_ = build_datasets(dataset_config(original, tmp_path), SAMPLES, reads_data=True)
    assert indices(train) == expected[0]
    with pytest.raises(DataError, match=r"index cache cannot be written to .*Read-only.*--data-cache-path"):
        build_datasets(dataset_config(original, tmp_path, seq_length=8), SAMPLES, reads_data=True)


def test_the_command_line_names_a_cache_that_cannot_be_made(original, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    line = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --micro-batch-size 1 "
        f"--global-batch-size 2 --train-iters 2 --lr 1e-3 --data-path {original} "
        "--data-cache-path /proc/nowhere"
    )
    with pytest.raises(
        ValueError, match=r"index cache cannot be written to /proc/nowhere \(.*--data-cache-path"
    ):
        parse_arguments(line.split())


def test_tokens_may_be_read_from_the_file(original, tmp_path):
    """The same samples, without a map of the file: its reader is Megatron's other one."""
    configs = [dataset_config(original, tmp_path, more=more) for more in ("", "--no-mmap-bin-files")]
    parts = [build_datasets(config, SAMPLES, reads_data=True)[0] for config in configs]
    assert [type(part.dataset.bin_reader).__name__ for part in parts] == ["_MMapBinReader", "_FileBinReader"]
    assert all(torch.equal(parts[0][i]["tokens"], parts[1][i]["tokens"]) for i in range(len(parts[0])))
