"""``--mock-data``: the samples that Megatron makes up, in training, evaluation and after a resume."""

from __future__ import annotations

import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer
from ranks import run_on_ranks
from training_worker import Fault, losses_of, run_cases

from megatron.pretrain.data.gpt import dataset_config
from megatron.pretrain.data.mock import build_mock_datasets
from megatron.pretrain.settings.arguments import parse_arguments

SIZES = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 64 --micro-batch-size 1 "
    "--global-batch-size 2 --lr 3e-3 --train-iters 3"
)
MOCK = f"{SIZES} --mock-data --tokenizer-type NullTokenizer --vocab-size 99 --split 949,50,1"
VALUES = ("tokens", "labels", "loss_mask", "position_ids")


def settings_of(monkeypatch, line):
    monkeypatch.setenv("WORLD_SIZE", "1")
    return parse_arguments(line.split())


def null_tokenizer():
    """Of tokens 0 to 98 and an end, which megatron-core counts since 0.18."""
    found = NullTokenizer(99)
    return found if found.eod == 99 else NullTokenizer(100)


def test_samples_are_megatrons_one_by_one(monkeypatch):
    settings = settings_of(monkeypatch, f"{MOCK} --seq-length 1000 --seed 7 --eval-iters 2")
    ours = build_mock_datasets(dataset_config(settings.data, settings.training), [1, 1, 1])
    # A job of 120 samples, as Megatron's program asks for them.
    config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=1000,
        blend=None,
        split="949,50,1",
        tokenizer=null_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    theirs = BlendedMegatronDatasetBuilder(MockGPTDataset, [120, 8, 8], lambda: True, config).build()
    assert ours[2] is None, "nothing is tested"
    for part, count in ((0, 120), (1, 8)):
        assert len(ours[part]) == len(theirs[part]) > 60_000
        for number in range(count):
            mine, megatrons = ours[part][number], theirs[part][number]
            assert all(torch.equal(mine[name], megatrons[name]) for name in VALUES)
    assert settings.data.dataset.vocab_size == 100
    assert (
        settings.data.dataset.eod
        == 99
        == int(torch.cat([s["tokens"] for s in map(ours[0].__getitem__, range(9))]).max())
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mock")
    cases = {
        "whole": "--eval-iters 1 --eval-interval 2",
        "first": f"--exit-interval 2 --save {folder}/saved",
        "second": f"--load {folder}/saved --pipeline-schedule helix",
        "other ids": f"--load {folder}/saved --vocab-size 98",
    }
    jobs = [(f"--lr-decay-iters 9 {line}", Fault()) for line in cases.values()]
    (found,) = run_on_ranks(1, run_cases, jobs, 1, 1, MOCK)
    return dict(zip(cases, found, strict=True))


def test_a_job_trains_evaluates_and_goes_on(outcomes):
    whole = losses_of(outcomes["whole"])
    assert list(whole) == ["1", "2", "3"]
    assert losses_of(outcomes["second"])["3"] == pytest.approx(whole["3"], rel=1e-5)
    assert any("validation loss at iteration 2" in line for line in outcomes["whole"]["lines"])
    assert any("made-up data: 20" in line for line in outcomes["whole"]["lines"])


def test_another_vocabulary_makes_other_data(outcomes):
    assert "the data of hash" in outcomes["other ids"]["error"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{MOCK} --data-path somewhere", "^--data-path and --mock-data are two sources"),
        (SIZES, "^there is no data; give --data-path PREFIX, or --mock-data$"),
        (f"{SIZES} --mock-data", "^--mock-data needs a vocabulary; add --tokenizer-type"),
    ],
)
def test_what_cannot_be_made_up_is_refused(monkeypatch, line, message):
    with pytest.raises(ValueError, match=message):
        settings_of(monkeypatch, line)
