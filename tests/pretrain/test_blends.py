"""Blends of datasets: Megatron's own samples in its order, what is refused, and a job that goes on."""

from __future__ import annotations

import json

import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import get_blend_from_list
from ranks import run_on_ranks
from training_worker import Fault, losses_of, run_cases

from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset
from helixpipe.plan.schedules import SCHEDULES
from megatron.pretrain.checkpoint.comparison import settings_of
from megatron.pretrain.data import gpt
from megatron.pretrain.data.blend import build_blends, samples_of_parts
from megatron.pretrain.data.gpt import dataset_config
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.data_sources import parse_blend

SIZES = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --micro-batch-size 1 "
    "--global-batch-size 4 --lr 3e-3 --split 80,20,0 --eval-interval 5 --eval-iters 1"
)
VALUES = ("tokens", "labels", "loss_mask", "position_ids")


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    """Three datasets of different sizes, of letters that tell them apart."""
    folder = tmp_path_factory.mktemp("data")
    for number, count in enumerate((30, 60, 12)):
        text = folder / f"{number}.jsonl"
        letters = "abcdefgh"[number::3]
        lines = (f'{{"text": "{letters[i % len(letters)] * (5 + 7 * i % 40)}"}}\n' for i in range(count))
        text.write_text("".join(lines))
        prepare_dataset(PreparationOptions([str(text)], str(folder / f"set{number}"), tokenizer="byte"))
    return [str(folder / f"set{number}") for number in range(3)]


def parse(monkeypatch, words, line=""):
    monkeypatch.setenv("WORLD_SIZE", "1")
    return parse_arguments([*f"{SIZES} --train-iters 20 {line}".split(), "--data-path", *words])


def ours(settings):
    configs = [dataset_config(settings.data, settings.training, corpus) for corpus in settings.data.corpora]
    return build_blends(configs, settings.data.weights, samples_of_parts(settings.training), reads_data=True)


def megatrons(settings, words):
    config = dataset_config(settings.data, settings.training)
    config.path_to_cache, config.blend = None, get_blend_from_list(words)
    sizes = [20 * 4, (20 // 5 + 1) * 4, 4]  # as its program asks for them
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


@pytest.mark.parametrize("weights", [None, (0.3, 0.7, 2.0), (5, 1, 1), (1,)], ids=str)
def test_samples_are_megatrons_one_by_one(prefixes, weights, monkeypatch):
    words = (
        prefixes
        if weights is None
        else [str(word) for pair in zip(weights, prefixes, strict=False) for word in pair]
    )
    settings = parse(monkeypatch, words)
    assert settings.data.is_blend
    found, expected = ours(settings), megatrons(settings, words)
    assert found[2] is expected[2] is None
    seen = set()
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        compare(mine, theirs)
        seen.update(theirs.dataset_index.tolist())
    assert seen == set(range(len(settings.data.corpora)))
    if weights is not None:
        assert len(found[0]) >= 80


def compare(found, expected):
    assert len(found) == len(expected) > 10
    for number in range(len(expected)):
        sample, megatrons_sample = found[number], expected[number]
        assert all(torch.equal(sample[name], megatrons_sample[name]) for name in VALUES)


@pytest.mark.parametrize(
    ("train", "valid"),
    [((0,), (1,)), ((0, 1), (2,)), ((0.3, 0, 0.7, 2), (1.0, 1)), ((0, 1, 2), (2, 1, 0))],
    ids=str,
)
@pytest.mark.parametrize("by_file", [False, True])
def test_parts_with_data_of_their_own_are_megatrons(prefixes, train, valid, by_file, tmp_path, monkeypatch):
    def words_of(numbers):
        is_weighted = len(numbers) % 2 == 0 and isinstance(numbers[0], float)
        return [str(n) if is_weighted and not i % 2 else prefixes[n] for i, n in enumerate(numbers)]

    words = [words_of(train), words_of(valid)]
    if by_file:
        parts = {"train": words[0], "valid": words[1], "test": None}
        (tmp_path / "parts.json").write_text(json.dumps(parts))
        line = f"--per-split-data-args-path {tmp_path}/parts.json"
    else:
        line = f"--train-data-path {' '.join(words[0])} --valid-data-path {' '.join(words[1])}"
    monkeypatch.setenv("WORLD_SIZE", "1")
    sizes = SIZES.replace("--split 80,20,0", "")
    settings = parse_arguments(f"{sizes} --train-iters 20 {line}".split())
    found = gpt._datasets(settings, reads_data=True)
    config = dataset_config(settings.data, settings.training)
    config.path_to_cache = config.blend = config.split = config.split_matrix = None
    config.blend_per_split = [get_blend_from_list(part) for part in words] + [None]
    expected = BlendedMegatronDatasetBuilder(GPTDataset, [80, 20, 4], lambda: True, config).build()
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        compare(mine, theirs)
    assert found[2] is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--train-data-path {0}", "--eval-iters 1 needs data for validation; add --valid-data-path"),
        ("--valid-data-path {0}", "names no data to train on"),
        ("--train-data-path {0} --data-path {1}", "--data-path and --train-data-path are two sources"),
        ("--train-data-path {0} --valid-data-path {1} --split 80,20,0", "--split 80,20,0 divides datasets"),
        ("--train-data-path 0 {0} --valid-data-path {1}", "--train-data-path: the weight 0"),
        ("--per-split-data-args-path {2}/wrong.json", "'training' is not understood; give the words"),
        ("--per-split-data-args-path {2}/none.json", "cannot be read"),
    ],
)
def test_parts_that_are_no_data_are_refused(prefixes, line, message, tmp_path, monkeypatch):
    (tmp_path / "wrong.json").write_text('{"training": ["a"]}')
    monkeypatch.setenv("WORLD_SIZE", "1")
    sizes = SIZES.replace("--split 80,20,0", "")
    line = line.format(prefixes[0], prefixes[1], tmp_path)
    with pytest.raises(ValueError, match=message):
        parse_arguments(f"{sizes} --train-iters 20 {line}".split())


def test_a_file_holds_the_words(prefixes, tmp_path, monkeypatch):
    (tmp_path / "blend.txt").write_text(f"0.25 {prefixes[0]}\n0.75 {prefixes[2]}\n")
    monkeypatch.setenv("WORLD_SIZE", "1")
    line = f"{SIZES} --train-iters 5 --data-args-path {tmp_path}/blend.txt"
    data = parse_arguments(line.split()).data
    assert ([corpus.prefix for corpus in data.corpora], data.weights) == (prefixes[::2], (0.25, 0.75))
    assert data.dataset.num_documents == 42
    with pytest.raises(ValueError, match="--data-path and --data-args-path are two sources"):
        parse_arguments([*line.split(), "--data-path", prefixes[0]])
    with pytest.raises(ValueError, match="give a file with the words of --data-path"):
        parse_arguments(f"{SIZES} --train-iters 5 --data-args-path {tmp_path}".split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("0.3 a 0 b", "weight 0 of a dataset must be above 0"),
        ("0.3 a nan b", "weight nan of a dataset"),
        ("0.3 a -1 b", "weight -1 of a dataset"),
        ("a b a", "has a twice; give it once"),
        ("1 a 2 a", "has a twice"),
        ("a 0.3", "0.3 is where a prefix is expected"),
        ("0.3 a b", "0.3 is where a prefix is expected"),
    ],
)
def test_words_that_are_no_blend_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_blend("--data-path", words.split())


def test_words_are_read_as_megatron_reads_them():
    for words in ("a", "a b", "a b c", "1 a", "0.3 a 0.7 b", "30 a 1e2 b"):
        prefixes, weights = get_blend_from_list(words.split())
        found = parse_blend("--data-path", words.split())
        assert (list(found.prefixes), found.weights and list(found.weights)) == (prefixes, weights)


@pytest.mark.parametrize(
    "schedule",
    [
        name
        for name, entry in SCHEDULES.items()
        if entry.execution is not None and not entry.execution.joins_documents
    ],
)
def test_one_dataset_for_schedules_of_documents(prefixes, schedule, monkeypatch):
    elastic = f"--pipeline-schedule {schedule} --max-seq-length 40"
    for words in (prefixes, ["1", prefixes[0]]):
        with pytest.raises(ValueError, match=f"{schedule} blends no datasets; give"):
            parse(monkeypatch, words, elastic)
    monkeypatch.setenv("WORLD_SIZE", "1")
    parts = f"{SIZES} {elastic} --train-iters 5 --train-data-path a --valid-data-path b"
    with pytest.raises(ValueError, match=f"{schedule} blends no datasets; give"):
        parse_arguments(parts.replace("--split 80,20,0", "").split())


def test_checkpoints_tell_blends_apart(prefixes, monkeypatch):
    first, second, _ = prefixes

    def data(*words, line=""):
        return settings_of(parse(monkeypatch, words, line))["data"]

    whole = data("1", first, "2", second)
    assert whole == data("1", first, "2", second)
    others = [
        data("2", first, "1", second), data("2", second, "1", first), data(first, second), data(first),
        data("1", first, "2", second, line="--global-batch-size 8"),
    ]  # fmt: skip
    assert len({whole, *others}) == 6
    sizes = SIZES.replace("--split 80,20,0", "")
    parts = parse_arguments(
        f"{sizes} --train-iters 20 --train-data-path {first} --valid-data-path {second}".split()
    )
    assert settings_of(parts)["data"] not in {whole, *others}


@pytest.fixture(scope="module")
def outcomes(prefixes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    base = f"{SIZES} --train-iters 4 --data-path 1 {prefixes[0]} 3 {prefixes[1]}"
    cases = {
        "whole": "",
        "first": f"--exit-interval 2 --save {folder}/saved",
        "second": f"--load {folder}/saved --pipeline-schedule helix",
        "other": f"--load {folder}/saved --data-path 3 {prefixes[0]} 1 {prefixes[1]}",
        "longer": f"--load {folder}/saved --train-iters 6 --lr-decay-iters 9",
    }
    jobs = [(f"--lr-decay-iters 9 {line}", Fault()) for line in cases.values()]
    (found,) = run_on_ranks(1, run_cases, jobs, 1, 1, base)
    return dict(zip(cases, found, strict=True))


@pytest.mark.slow
def test_a_job_over_a_blend_goes_on(outcomes):
    whole = losses_of(outcomes["whole"])
    assert len(whole) == 4
    assert losses_of(outcomes["first"]) | losses_of(outcomes["second"]) == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["other", "longer"])
def test_another_blend_is_refused(outcomes, name):
    assert "the data of hash" in str(outcomes[name])
