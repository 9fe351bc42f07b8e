"""Samples of different lengths: bounded by documents, cut off, masked, in a reproducible order."""

import contextlib
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helixpipe.data.index_file import LOSS_MODE, PROMPT_MODE, open_index
from helixpipe.data.prefix import DatasetInfo, dataset_paths, inspect_prefix, load_tokenizer
from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset
from helixpipe.data.samples import ShuffledOrder, document_samples
from megatron.pretrain.data.variable_length import VariableLengthDataset
from megatron.pretrain.settings.arguments import parse_arguments

SCRIPT = Path(__file__).parents[2] / "tools" / "prepare_data.py"


def prepare_data(arguments):
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(arguments)


def write(folder, documents, dtype=np.uint16, multimodal=True):
    """A dataset of documents, each a list of (mode, ids)."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = folder / "set"
    paths = dataset_paths(prefix)
    builder = IndexedDatasetBuilder(paths.bin, dtype=dtype, multimodal=multimodal)
    for document in documents:
        for mode, ids in document:
            builder.add_item(torch.tensor(ids), mode)
        builder.end_document()
    builder.finalize(paths.idx)
    count = sum(len(ids) for document in documents for _, ids in document)
    return DatasetInfo(str(prefix), 1000, 0, len(documents), count, 0, has_prompts=multimodal)


def expected(documents, longest):
    """Document number, ids and mask of every sample, token by token."""
    found = []
    for number, document in enumerate(documents):
        ids = [i for _, part in document for i in part][: longest + 1]
        has_loss = [mode == LOSS_MODE for mode, part in document for _ in part][1 : longest + 1]
        if len(ids) > 1 and any(has_loss):
            found.append((number, ids, has_loss))
    return found


PARTS = st.lists(
    st.tuples(st.sampled_from([LOSS_MODE, PROMPT_MODE]), st.lists(st.integers(0, 999), max_size=5)),
    max_size=4,
)


# Nothing predicts the first id, so a document that has its loss there alone has none.
@example([[(LOSS_MODE, [7]), (PROMPT_MODE, [8, 9])], [(LOSS_MODE, [1, 2])]], 5, True)
@settings(max_examples=150, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=6), st.integers(1, 12), st.booleans())
def test_samples_are_what_a_loop_over_tokens_finds(tmp_path_factory, documents, longest, has_prompts):
    if not has_prompts:
        documents = [[(LOSS_MODE, ids) for _, ids in document] for document in documents]
    if not any(ids for document in documents for _, ids in document):
        documents.append([(LOSS_MODE, [1, 2])])
    folder = tmp_path_factory.mktemp("any")
    info = write(folder, documents, multimodal=has_prompts)
    wanted = expected(documents, longest)
    if not wanted:
        with pytest.raises(ValueError, match="has a token to learn"):
            VariableLengthDataset(info, longest)
        return
    dataset = VariableLengthDataset(info, longest)
    assert list(dataset.samples.documents) == [number for number, _, _ in wanted]
    assert list(dataset.lengths) == [len(ids) - 1 for _, ids, _ in wanted]
    for number, (_, ids, has_loss) in enumerate(wanted):
        sample = dataset[number]
        assert sample.ids.dtype == torch.int64
        assert sample.ids.tolist() == ids
        assert (sample.loss_mask is None) == (not has_prompts)
        assert has_loss == ([True] * len(has_loss) if sample.loss_mask is None else sample.loss_mask.tolist())
    sizes = [sum(len(ids) for _, ids in document) for document in documents]
    samples = dataset.samples
    assert samples.too_short == sum(size < 2 for size in sizes)
    assert samples.without_loss == sum(size >= 2 for size in sizes) - len(wanted)
    long = [sizes[number] for number, _, _ in wanted if sizes[number] > longest + 1]
    assert samples.truncated == len(long)
    assert samples.lost_tokens == sum(size - longest - 1 for size in long)


def test_consecutive_documents_can_be_chosen(tmp_path):
    documents = [[(LOSS_MODE, [n, n, n])] for n in range(5)]
    info = write(tmp_path, documents)
    dataset = VariableLengthDataset(info, 9, range(1, 4))
    assert [sample.ids[0].item() for sample in dataset] == [1, 2, 3]
    with pytest.raises(ValueError, match="none of 0 documents"):
        VariableLengthDataset(info, 9, range(2, 2))
    with pytest.raises(ValueError, match="--max-seq-length must be at least 1, not 0"):
        VariableLengthDataset(info, 0)


@pytest.mark.parametrize("bad", [-1, 1000])
def test_ids_outside_the_vocabulary_are_named(tmp_path, bad):
    info = write(tmp_path, [[(LOSS_MODE, [1, 2])], [(LOSS_MODE, [3, bad, 4])]], np.int32, multimodal=False)
    dataset = VariableLengthDataset(info, 9)
    assert dataset[0].ids.tolist() == [1, 2]
    with pytest.raises(ValueError, match=f"token 1 of document 1 has id {bad}, outside the vocabulary"):
        dataset[1]


def test_reading_a_sample_does_not_read_the_dataset(tmp_path):
    info = write(tmp_path, [[(LOSS_MODE, [1, 2, 3])], [(LOSS_MODE, [4, 5])]], multimodal=False)
    dataset = VariableLengthDataset(info, 2)
    assert isinstance(dataset._ids, np.memmap)
    sample = dataset[0]
    sample.ids[0] = 999
    assert dataset[0].ids.tolist() == [1, 2, 3], "a sample is a copy, the file is not written to"


# Order


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(0, 200), st.integers(0, 90))
@settings(max_examples=100, deadline=None)
def test_the_order_goes_on_from_any_position(count, seed, position, taken):
    whole = ShuffledOrder(count, seed).samples(0, 300)
    assert np.array_equal(
        ShuffledOrder(count, seed).samples(position, taken), whole[position : position + taken]
    )
    for epoch in range(300 // count):
        assert sorted(whole[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_differ_and_releases_do_not():
    order = ShuffledOrder(8, seed=1234)
    # Written down: a job that is resumed under another release of NumPy must go on in the same order.
    assert order.samples(0, 16).tolist() == EPOCHS_OF_SEED_1234
    assert ShuffledOrder(8, seed=1235).samples(0, 8).tolist() != EPOCHS_OF_SEED_1234[:8]
    assert EPOCHS_OF_SEED_1234[:8] != EPOCHS_OF_SEED_1234[8:]
    with pytest.raises(ValueError, match="--seed must be from 0"):
        ShuffledOrder(8, seed=-1)


EPOCHS_OF_SEED_1234 = [4, 5, 3, 1, 2, 0, 6, 7, 5, 7, 1, 3, 4, 2, 0, 6]


# JSONL of prompts and responses


def prepare(folder, rows, **options):
    source = folder / "chat.jsonl"
    source.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    options = {"json_key": "response", "prompt_key": "prompt", "tokenizer": "byte", **options}
    return prepare_dataset(PreparationOptions([str(source)], str(folder / "set"), **options))


ROWS = [
    {"prompt": "two plus two? ", "response": "four"},
    {"prompt": "", "response": "no prompt"},
    {"prompt": "no response", "response": ""},
    {"prompt": "é" * 40, "response": "too late"},
]


def test_loss_is_on_responses_alone(tmp_path):
    summary = prepare(tmp_path, ROWS)
    assert (summary.documents, summary.empty_documents) == (3, 1)
    assert summary.longest_length == 80 + len("too late") + 1
    dataset = VariableLengthDataset(inspect_prefix(tmp_path / "set"), 64)
    tokenizer = load_tokenizer(dataset_paths(tmp_path / "set").tokenizer)
    end = dataset.info.eod
    assert (len(dataset), dataset.samples.without_loss) == (2, 1)
    for sample, row in zip((dataset[0], dataset[1]), ROWS, strict=False):
        assert tokenizer.decode(sample.ids[:-1].tolist()) == row["prompt"] + row["response"]
        learned = sample.ids[1:][sample.loss_mask].tolist()
        # Nothing predicts the very first id.
        assert learned == [*(row["response"] if row["prompt"] else row["response"][1:]).encode(), end]


def test_prompts_agree_with_megatrons_reader(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prepare(tmp_path, ROWS)
    theirs = IndexedDataset(str(tmp_path / "set"), multimodal=True)
    ours = open_index(dataset_paths(tmp_path / "set").idx)
    assert np.array_equal(ours.modes, theirs.index.sequence_modes)
    assert list(ours.modes) == [PROMPT_MODE, LOSS_MODE, LOSS_MODE, PROMPT_MODE, LOSS_MODE]
    assert np.array_equal(ours.document_indices, theirs.document_indices)
    assert len(document_samples(ours)) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_trained_tokenizer_knows_prompts_too(tmp_path, workers):
    rows = [{"prompt": "question " * 20, "response": "answer"}] * 20
    prepare(tmp_path, rows, tokenizer="bpe", vocab_size=300, workers=workers)
    tokens = load_tokenizer(dataset_paths(tmp_path / "set").tokenizer).encode("question question")
    assert len(tokens.ids) < 6


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([ROWS[0], {"prompt": "x"}], {}, r"chat\.jsonl:2: has no key 'response' .*set --response-key"),
        ([ROWS[0], "\n", {"response": "x"}], {}, r"chat\.jsonl:3: has no key 'prompt' .*set --prompt-key"),
        ([{"prompt": 1, "response": "x"}], {}, r"chat\.jsonl:1: the value of 'prompt' is not a string"),
        (["{\n"], {}, r"chat\.jsonl:1: invalid JSON"),
        (["[]\n"], {}, r"chat\.jsonl:1: is not a JSON object"),
        (ROWS, {"json_key": "prompt"}, "are both 'prompt'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, rows, options, words):
    with pytest.raises(ValueError, match=words) as error:
        prepare(tmp_path, rows, **options)
    assert "\n" not in str(error.value)
    assert not os.path.exists(dataset_paths(tmp_path / "set").idx)


def test_prompts_need_jsonl_and_are_not_joined(tmp_path):
    (tmp_path / "plain.txt").write_text("text")
    options = PreparationOptions([str(tmp_path / "plain.txt")], str(tmp_path / "set"), prompt_key="prompt")
    with pytest.raises(ValueError, match=r"plain\.txt: a text file has no prompts"):
        prepare_dataset(options)
    prepare(tmp_path, ROWS)
    info = inspect_prefix(tmp_path / "set")
    assert info.has_prompts
    line = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 4 --micro-batch-size 1 "
        "--global-batch-size 1 --train-iters 1 --lr 1e-3 --eval-iters 0 --data-path"
    )
    with pytest.raises(ValueError, match=r"has prompts, .* joins documents .* use elastic"):
        parse_arguments([*line.split(), str(tmp_path / "set")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--response-key", "a"], "--response-key goes with --prompt-key"),
        (["--prompt-key", "p", "--json-key", "a"], "give --response-key"),
        (["--prompt-key", "p", "--response-key", "p"], "are both 'p'"),
    ],
)
def test_prompt_options_of_the_command(tmp_path, capsys, options, words):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"p": "why? ", "a": "because", "response": "so"}) + "\n")
    command = ["--input", str(source), "--output-prefix", str(tmp_path / "set"), "--tokenizer", "byte"]
    with contextlib.suppress(SystemExit):
        assert prepare_data([*command, *options]) == 2
    assert words in capsys.readouterr().err
    for option, wanted in ((["--response-key", "a"], "because"), (["--overwrite"], "so")):
        assert prepare_data([*command, "--prompt-key", "p", *option]) == 0
        dataset = VariableLengthDataset(inspect_prefix(tmp_path / "set"), 64)
        assert bytes(dataset[0].ids[:-1].tolist()).decode() == "why? " + wanted
