"""Checks a dataset prefix: PREFIX.bin, PREFIX.idx (see :mod:`helixpipe.data.index_file`) and, where it was
prepared with a tokenizer of its own, PREFIX.tokenizer.json.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from helixpipe.data.index_file import PREPARE_AGAIN, check_index, open_index
from helixpipe.data.text_tokenizers import (
    END_OF_DOCUMENT,
    TokenizerSettings,
    open_tokenizer,
    parse_tokenizer,
    vocabulary_size,
)
from helixpipe.reliability.exit_codes import DataError

_TOKENS_PER_STEP = 1 << 20
_BYTES_READ_WHOLE = 1 << 28
_BLOCKS = 64


@dataclass(frozen=True)
class DatasetInfo:
    """What the headers of a dataset say; lengths are in tokens, ends of document included.

    A dataset with prompts has documents of a prompt and a response, with the loss on the response alone. One
    without a tokenizer file has only the two files that Megatron's tools write. The longest document is known
    once all entries of the index are read.
    """

    prefix: str
    vocab_size: int
    eod: int
    num_documents: int
    num_tokens: int
    longest_document: int | None
    has_prompts: bool = False
    has_tokenizer_file: bool = True


class DatasetPaths(NamedTuple):
    """The three files of a dataset."""

    bin: str
    idx: str
    tokenizer: str


def dataset_paths(prefix: str | os.PathLike[str]) -> DatasetPaths:
    """Return the names of the three files that stand at a prefix."""
    name = os.fsdecode(prefix)
    return DatasetPaths(f"{name}.bin", f"{name}.idx", f"{name}.tokenizer.json")


def without_suffix(prefix: str) -> str | None:
    """Return the prefix meant by one who gave a dataset file's name, None for a plain prefix."""
    for suffix in (".bin", ".idx", ".tokenizer.json"):
        if prefix.endswith(suffix):
            return prefix.removesuffix(suffix)
    return None


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer file that has an end-of-document token.

    Raises:
        DataError: The file cannot be read, is not the JSON of the `tokenizers` library, or has no
            `<|endoftext|>`.
    """
    path = os.fsdecode(path)
    try:
        with open(path, "rb") as stream:
            content = stream.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    tokenizer = parse_tokenizer(content, path)
    try:
        end_of_document_id(tokenizer)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return tokenizer


def end_of_document_id(tokenizer: Tokenizer) -> int:
    """Return the id that ends a document.

    Raises:
        DataError: The tokenizer has no `<|endoftext|>`.
    """
    token_id = tokenizer.token_to_id(END_OF_DOCUMENT)
    if token_id is None:
        raise DataError(
            f"has no {END_OF_DOCUMENT} token: add it as a special token, or use a tokenizer "
            "trained by helixpipe prepare"
        )
    return token_id


def describe_prefix(
    prefix: str | os.PathLike[str], tokenizer: TokenizerSettings | None = None
) -> DatasetInfo:
    """The sizes of a dataset by the headers of its files: reads a few hundred bytes, and the tokenizer.

    Args:
        prefix: of the files.
        tokenizer: that the dataset was made with; None for that in PREFIX.tokenizer.json.

    Raises:
        DataError: One of the three files is missing, damaged, or does not fit the others.
    """
    name = os.fsdecode(prefix)
    paths = dataset_paths(name)
    _require_files(name, paths if tokenizer is None else paths[:2])
    index = open_index(paths.idx)
    num_bytes = index.num_bytes
    _check_bin_size(paths, num_bytes)
    if tokenizer is None:
        own = load_tokenizer(paths.tokenizer)
        vocab_size, eod = vocabulary_size(own), end_of_document_id(own)
    else:
        named = open_tokenizer(tokenizer)
        vocab_size, eod = named.vocab_size, named.end[-1]
    return DatasetInfo(
        prefix=name,
        vocab_size=vocab_size,
        eod=eod,
        num_documents=index.num_documents,
        num_tokens=num_bytes // index.dtype.itemsize,
        longest_document=None,
        has_prompts=index.modes is not None,
        has_tokenizer_file=tokenizer is None,
    )


def inspect_prefix(prefix: str | os.PathLike[str], tokenizer: TokenizerSettings | None = None) -> DatasetInfo:
    """As :func:`describe_prefix`, after a look at every entry of the index.

    Raises:
        DataError: as there, or an entry that does not fit the others.
    """
    name = os.fsdecode(prefix)
    paths = dataset_paths(name)
    _require_files(name, paths if tokenizer is None else paths[:2])
    longest = check_index(open_index(paths.idx))
    return replace(describe_prefix(name, tokenizer), longest_document=longest)


def check_token_ids(prefix: str | os.PathLike[str], info: DatasetInfo) -> None:
    """Check that token ids are in the vocabulary: all of them up to 256 MiB, else those of 64 even blocks.

    What a block does not hold is checked when it becomes part of a sample.

    Raises:
        DataError: A token id is out of range, or the files changed since `info` was read.
    """
    paths = dataset_paths(prefix)
    index = open_index(paths.idx)
    _check_bin_size(paths, info.num_tokens * index.dtype.itemsize)
    tokens = np.memmap(paths.bin, dtype=index.dtype, mode="r")
    stride = _TOKENS_PER_STEP
    if tokens.nbytes > _BYTES_READ_WHOLE:
        stride = max(_TOKENS_PER_STEP, len(tokens) // _BLOCKS)
    for start in range(0, len(tokens), stride):
        part = tokens[start : start + _TOKENS_PER_STEP]
        if part.min() >= 0 and part.max() < info.vocab_size:
            continue
        first = int(np.flatnonzero((part < 0) | (part >= info.vocab_size))[0])
        raise DataError(
            f"{paths.bin}: token {start + first} has id {part[first]}, outside the vocabulary of "
            f"{info.vocab_size} {whose_vocabulary(info)}"
        )


def whose_vocabulary(info: DatasetInfo) -> str:
    """For a message about an id outside of it: where the vocabulary comes from, and what to do."""
    if info.has_tokenizer_file:
        file = dataset_paths(info.prefix).tokenizer
        return f"in {file}: the files are not of one dataset; {PREPARE_AGAIN}"
    return "that the tokenizer has: give the --tokenizer-type and files that the data were made with"


def _require_files(prefix: str, paths: Sequence[str]) -> None:
    missing = [path for path in paths if not os.path.isfile(path)]
    if not missing:
        return
    meant = without_suffix(prefix)
    if meant is not None:
        remedy = f"give the prefix without the suffix, {meant}"
    elif missing == [dataset_paths(prefix).tokenizer]:
        remedy = (
            "data of Megatron's own tools have none: name their tokenizer with --tokenizer-type and its files"
        )
    elif len(missing) == len(paths):
        remedy = "check the prefix, or make the dataset with helixpipe prepare"
    else:
        remedy = f"copy it next to the others, or {PREPARE_AGAIN}"
    raise DataError(f"{missing[0]}: no such file: {remedy}")


def _check_bin_size(paths: DatasetPaths, expected: int) -> None:
    try:
        size = os.path.getsize(paths.bin)
    except OSError as error:
        raise DataError(f"{paths.bin}: cannot be read ({error.strerror}): check the file") from error
    if size != expected:
        raise DataError(
            f"{paths.bin}: is {size} bytes, but {paths.idx} describes {expected}: "
            f"copy both files again, or {PREPARE_AGAIN}"
        )
