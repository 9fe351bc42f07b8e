"""Ranks that were not given the same are all told so, with both values."""

from __future__ import annotations

import dataclasses

import pytest
import torch.distributed as dist
from threads import run_on_threads

from helixpipe.data.prefix import DatasetInfo
from helixpipe.reliability import versions
from megatron.pretrain.health.agreement import agree_on_arguments, fingerprint
from megatron.pretrain.settings.arguments import parse_arguments

DATASET = DatasetInfo("unused", 300, eod=0, num_documents=100, num_tokens=10_000, longest_document=5)
COMMAND = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 12 --train-iters 10 --lr 1e-3 --data-path unused"
)


@pytest.fixture
def refusals(monkeypatch):
    """``refusals({rank: arguments}, {rank: dataset})``: what each of three ranks is told."""
    monkeypatch.setenv("WORLD_SIZE", "3")

    def compare(arguments, datasets=None):
        store = dist.HashStore()
        everyone = []
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            words = f"{COMMAND} {arguments.get(rank, '')}".split()
            everyone.append(parse_arguments(words, (datasets or {}).get(rank, DATASET)))

        def told(rank):
            try:
                agree_on_arguments(everyone[rank], store)
            except ValueError as error:
                return str(error)
            return ""

        return run_on_threads(3, told)

    return compare


def test_equal_ranks_go_on(refusals):
    assert refusals({}) == ["", "", ""]


def test_what_belongs_to_one_host_may_differ(refusals, tmp_path):
    paths = {rank: f"--data-path at{rank} --save {tmp_path}/{rank} --num-workers {rank}" for rank in (0, 1)}
    assert refusals(paths) == ["", "", ""]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--seq-length 16", "--seq-length is 32 on rank 0, 16 on rank 1"),
        ("--bf16", "--bf16 is False on rank 0, True on rank 1"),
        ("--pipeline-schedule gpipe", "plan is "),
        ("--seed 7", "--seed is 1234 on rank 0, 7 on rank 1"),
    ],
)
def test_every_rank_is_told_both_values(refusals, change, named):
    (told,) = set(refusals({1: change}))
    assert told.startswith("ranks disagree: ")
    assert named in told
    assert told.endswith("Start every rank with the same command and files")


def test_another_data_set_under_the_same_name(refusals):
    changed = dataclasses.replace(DATASET, num_tokens=9_999)
    (told,) = set(refusals({}, {2: changed}))
    assert "data set, num_tokens is 10000 on rank 0, 9999 on rank 2" in told


def test_many_differences_are_counted(refusals):
    sizes = "--seq-length 16 --hidden-size 128 --num-layers 8 --lr 1 --seed 1 --clip-grad 2 --adam-eps 1"
    (told,) = set(refusals({1: sizes, 2: sizes}))
    assert "; and " in told
    assert "(and 1 more ranks differ)" in told


def test_an_old_copy_of_the_code_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = parse_arguments(COMMAND.split(), DATASET)
    here = fingerprint(settings)["code of helixpipe"]
    (tmp_path / "__init__.py").write_text("# older\n")
    monkeypatch.setattr(versions.helixpipe, "__file__", str(tmp_path / "__init__.py"))
    assert fingerprint(settings)["code of helixpipe"] != here
