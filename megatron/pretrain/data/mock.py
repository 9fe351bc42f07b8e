"""Megatron's made-up documents, for jobs without data of their own: numbers that count up, then an end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset, MockGPTLowLevelDataset
from megatron.core.datasets.utils import Split

from helixpipe.data.prefix import DatasetInfo
from helixpipe.data.text_tokenizers import TokenizerSettings, open_tokenizer
from helixpipe.plan.execution import Execution
from megatron.pretrain.data.index_cache import documents_of_part


def describe_mock(tokenizer: TokenizerSettings | None, execution: Execution) -> DatasetInfo:
    """The sizes of the documents that a tokenizer's vocabulary gives.

    Args:
        tokenizer: that tells the vocabulary and the token that ends a document.
        execution: of the job's schedule.

    Raises:
        ValueError: no tokenizer, or a schedule that has no use for documents that are made up.
    """
    if tokenizer is None:
        raise ValueError(
            "--mock-data needs a vocabulary; add --tokenizer-type, like NullTokenizer with --vocab-size N"
        )
    if not execution.joins_documents:
        raise ValueError(
            "--mock-data makes up sequences of one length; use --data-path for elastic batches, or another "
            "schedule"
        )
    named = open_tokenizer(tokenizer)
    vocab_size, eod = named.vocab_size, named.end[-1]
    lengths = MockGPTLowLevelDataset(SimpleNamespace(vocab_size=vocab_size, eod=eod)).sequence_lengths
    return DatasetInfo(
        prefix="",
        vocab_size=vocab_size,
        eod=eod,
        num_documents=len(lengths),
        num_tokens=int(lengths.sum(dtype=np.int64)),
        longest_document=int(lengths.max()),
        has_tokenizer_file=False,
    )


def mock_content(info: DatasetInfo) -> str:
    """SHA-256 of what the documents depend on, as :func:`helixpipe.data.fingerprint.fingerprint` of files."""
    return hashlib.sha256(f"mock {info.vocab_size} {info.eod}".encode()).hexdigest()


def build_mock_datasets(config: GPTDatasetConfig, num_samples: Sequence[int]) -> list[MockGPTDataset | None]:
    """The training, validation and test part, in this process's memory.

    Args:
        config: without ``blend``; its ``split_matrix`` with None for parts that are not used.
        num_samples: at least so many of each part.
    """
    whole = MockGPTDataset.build_low_level_dataset(None, config)
    count = MockGPTDataset.numel_low_level_dataset(whole)
    return [
        bounds
        and MockGPTDataset(whole, None, np.array(documents_of_part(bounds, count)), samples, part, config)
        for bounds, samples, part in zip(config.split_matrix, num_samples, Split, strict=True)
    ]
