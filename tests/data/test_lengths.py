"""The command lengths: statistics, a histogram, and a file that elastic takes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helixpipe.__main__ import main
from helixpipe.data.prefix import dataset_paths, inspect_prefix
from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset
from helixpipe.data.samples import ShuffledOrder
from helixpipe.data.statistics import Bin, length_statistics
from helixpipe.elastic.job import check_lengths
from megatron.pretrain.data.variable_length import VariableLengthDataset

SIZES = [1, 2, 3, 4, 7, 8, 100, 1000]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps({"text": "x" * size}) + "\n" for size in SIZES))
    prepare_dataset(PreparationOptions([str(source)], str(folder / "set"), tokenizer="byte"))
    return folder / "set"


def run(*arguments):
    return main(["lengths", *map(str, arguments)])


def test_statistics_by_hand():
    found = length_statistics(np.array([1, 2, 3, 4, 7, 8, 100, 1000]))
    assert (found.samples, found.tokens, found.median, found.longest) == (8, 1125, 4, 1000)
    assert (found.mean, found.longest_share) == (1125 / 8, 1000 / 1125)
    filled = [entry for entry in found.bins if entry.samples]
    assert filled == [
        Bin(1, 1, 1, 1),
        Bin(2, 3, 2, 5),
        Bin(4, 7, 2, 11),
        Bin(8, 15, 1, 8),
        Bin(64, 127, 1, 100),
        Bin(512, 1000, 1, 1000),
    ]
    assert [entry.first for entry in found.bins] == [2**k for k in range(10)]


def test_quantiles_are_lengths_that_exist():
    found = length_statistics(np.arange(1, 101)[::-1])
    assert (found.median, found.p90, found.p99) == (50, 90, 99)


def test_everything_is_printed_and_written(dataset, tmp_path, capsys):
    output = tmp_path / "lengths.json"
    assert run(dataset, "--max-seq-length", 64, "--output", output) == 0
    printed = capsys.readouterr().out
    wanted = [min(size, 64) for size in SIZES]
    assert check_lengths(json.loads(output.read_text())) == tuple(wanted)
    assert wanted == list(VariableLengthDataset(inspect_prefix(dataset), 64).lengths)
    assert f"{len(SIZES)} samples, {sum(wanted)} tokens" in printed
    assert "cut off after 64 tokens: 2 samples, 972 tokens lost (86.4%)" in printed
    assert "median 4" in printed
    rows = [line.split() for line in printed.splitlines() if " - " in line]
    assert [row[:4] for row in rows] == [
        ["1", "-", "1", "1"],
        ["2", "-", "3", "2"],
        ["4", "-", "7", "2"],
        ["8", "-", "15", "1"],
        ["16", "-", "31", "0"],
        ["32", "-", "63", "0"],
        ["64", "-", "64", "2"],
    ]
    assert rows[6][-1] == "█" * 32
    assert rows[4][-1] == "0.0%", "an empty row has no bars"


def test_a_batch_is_the_one_that_training_draws(dataset, tmp_path, capsys):
    output = tmp_path / "lengths.json"
    assert run(dataset, "--global-batch-size", 5, "--seed", 7, "--output", output) == 0
    order = ShuffledOrder(len(SIZES), 7).samples(0, 5)
    assert json.loads(output.read_text()) == [SIZES[i] for i in order]
    assert "A batch of 5:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["{}", "--max-seq-length", "0"], "--max-seq-length: must be at least 1", 2),
        (["{}", "--seed", "1"], "give --global-batch-size", 2),
        (["{}", "--global-batch-size", "0"], "--global-batch-size: must be at least 1", 2),
        (["{}", "--global-batch-size", "1", "--seed", "-1"], "--seed: must be at least 0", 2),
        (["{}.idx"], "give the prefix without the suffix", 2),
        (["{}x"], "cannot be read", 3),
    ],
)
def test_wrong_input_is_one_line(dataset, capsys, arguments, words, code):
    assert run(*(argument.format(dataset) for argument in arguments)) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_damaged_index_is_refused(dataset, tmp_path, capsys):
    path = tmp_path / "set.idx"
    shutil.copy(dataset_paths(dataset).idx, path)
    data = bytearray(path.read_bytes())
    data[34 + 4 * len(SIZES)] ^= 1
    path.write_bytes(data)
    assert run(tmp_path / "set") == 3
    assert "sequence 0 does not start where" in capsys.readouterr().err


def test_neither_torch_nor_megatron_is_loaded(dataset):
    program = (
        "import sys; from helixpipe.__main__ import main; assert main(['lengths', sys.argv[1]]) == 0; "
        "assert not {'torch', 'megatron', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(dataset)], cwd=Path(__file__).parents[2])
    assert done.returncode == 0
