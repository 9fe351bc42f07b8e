"""A small corpus for training runs inside the ranks of a test."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from megatron.training.data.corpus import PreparationOptions, prepare_dataset


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> Path:
    """A prefix with the standard library's json package, byte by byte."""
    prefix = tmp_path_factory.mktemp("small") / "json"
    source = Path(sysconfig.get_path("stdlib")) / "json"
    prepare_dataset(PreparationOptions([str(source)], str(prefix), pattern="*.py", tokenizer="byte"))
    return prefix


@pytest.fixture(scope="session")
def common(small_corpus) -> str:
    """Arguments of a model that trains in a moment."""
    return (
        "--num-layers 4 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --micro-batch-size 1 "
        f"--global-batch-size 4 --train-iters 3 --lr 3e-3 --data-path {small_corpus}"
    )
