"""Checks a dataset prefix: PREFIX.bin, PREFIX.idx and PREFIX.tokenizer.json.

The .idx file is little-endian:

    ======  =====================  ==================================================
    offset  type                   content
    ======  =====================  ==================================================
    0       9 bytes                magic, ``MMIDIDX`` and two zero bytes
    9       uint64                 version, 1
    17      uint8                  code of the token type in .bin
    18      uint64                 S, number of sequences
    26      uint64                 D, number of document indices (documents + 1)
    34      int32[S]               tokens in each sequence
    34+4S   int64[S]               byte offset of each sequence in .bin
    34+12S  int64[D]               index of each document's first sequence, then S
    ======  =====================  ==================================================

megatron-core checks this layout with assertions, or not at all: a damaged file gives a bare
``AssertionError`` or wrong tokens. Here each defect is a DataError, a ValueError, of one line that names the
file, the defect and the remedy.
"""

import os
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from helixpipe.reliability.exit_codes import DataError

END_OF_DOCUMENT = "<|endoftext|>"

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float64",
    7: "float32",
    8: "uint16",
}
_ENTRIES_PER_STEP = 1 << 20
_TOKENS_PER_STEP = 1 << 24

_PREPARE_AGAIN = "prepare the dataset again with tools/prepare_data.py"


@dataclass(frozen=True)
class DatasetInfo:
    """What the headers of a dataset say; lengths are in tokens, ends of document included."""

    prefix: str
    vocab_size: int
    eod: int
    num_documents: int
    num_tokens: int
    longest_document: int


class DatasetPaths(NamedTuple):
    """The three files of a dataset."""

    bin: str
    idx: str
    tokenizer: str


class _Index(NamedTuple):
    path: str
    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    document_indices: np.ndarray


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
        with open(path, encoding="utf-8") as stream:
            tokenizer = Tokenizer.from_str(stream.read())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except Exception as error:  # the library raises plain Exception for any bad content
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: is not a tokenizer of the `tokenizers` library ({reason}): "
            "give a tokenizer.json that it saved"
        ) from error
    try:
        end_of_document_id(tokenizer)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return the number of rows an embedding needs; ids need not be contiguous."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_document_id(tokenizer: Tokenizer) -> int:
    """Return the id that ends a document.

    Raises:
        DataError: The tokenizer has no `<|endoftext|>`.
    """
    token_id = tokenizer.token_to_id(END_OF_DOCUMENT)
    if token_id is None:
        raise DataError(
            f"has no {END_OF_DOCUMENT} token: add it as a special token, or use a tokenizer "
            "trained by tools/prepare_data.py"
        )
    return token_id


def inspect_prefix(prefix: str | os.PathLike[str]) -> DatasetInfo:
    """Check the structure of a dataset and return its sizes, without reading its tokens.

    Raises:
        DataError: One of the three files is missing, damaged, or does not fit the others.
    """
    name = os.fsdecode(prefix)
    paths = dataset_paths(name)
    _require_files(name, paths)
    index = _open_index(paths.idx)
    num_bytes = _check_sequences(index)
    longest = _check_documents(index, num_bytes)
    _check_bin_size(paths, num_bytes)
    tokenizer = load_tokenizer(paths.tokenizer)
    return DatasetInfo(
        prefix=name,
        vocab_size=vocabulary_size(tokenizer),
        eod=end_of_document_id(tokenizer),
        num_documents=len(index.document_indices) - 1,
        num_tokens=num_bytes // index.dtype.itemsize,
        longest_document=longest,
    )


def check_token_ids(prefix: str | os.PathLike[str], info: DatasetInfo) -> None:
    """Check that every token id is in the vocabulary; reads the whole .bin once.

    Raises:
        DataError: A token id is out of range, or the files changed since `info` was read.
    """
    paths = dataset_paths(prefix)
    index = _open_index(paths.idx)
    _check_bin_size(paths, info.num_tokens * index.dtype.itemsize)
    tokens = np.memmap(paths.bin, dtype=index.dtype, mode="r")
    for start in range(0, len(tokens), _TOKENS_PER_STEP):
        part = tokens[start : start + _TOKENS_PER_STEP]
        if part.min() >= 0 and part.max() < info.vocab_size:
            continue
        first = int(np.flatnonzero((part < 0) | (part >= info.vocab_size))[0])
        raise DataError(
            f"{paths.bin}: token {start + first} has id {part[first]}, outside the vocabulary of "
            f"{info.vocab_size} in {paths.tokenizer}: the files are not of one dataset; "
            f"{_PREPARE_AGAIN}"
        )


def _require_files(prefix: str, paths: DatasetPaths) -> None:
    missing = [path for path in paths if not os.path.isfile(path)]
    if not missing:
        return
    meant = without_suffix(prefix)
    if meant is not None:
        remedy = f"give the prefix without the suffix, {meant}"
    elif len(missing) == len(paths):
        remedy = "check the prefix, or make the dataset with tools/prepare_data.py"
    else:
        remedy = f"copy it next to the others, or {_PREPARE_AGAIN}"
    raise DataError(f"{missing[0]}: no such file: {remedy}")


def _open_index(path: str) -> _Index:
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            head = stream.read(_HEADER.size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the file") from error
    if not _MAGIC.startswith(head[: len(_MAGIC)]):
        raise DataError(f"{path}: is not a Megatron index (wrong magic): {_PREPARE_AGAIN}")
    if len(head) < _HEADER.size:
        raise DataError(
            f"{path}: is truncated, {size} bytes where the header alone has {_HEADER.size}: {_PREPARE_AGAIN}"
        )
    _, version, code, sequences, indices = _HEADER.unpack(head)
    if version != _VERSION:
        raise DataError(f"{path}: has version {version}, only version {_VERSION} is known: {_PREPARE_AGAIN}")
    if code not in _DTYPES:
        raise DataError(f"{path}: has an unknown dtype code, {code}: {_PREPARE_AGAIN}")
    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    if dtype.kind == "f":
        raise DataError(f"{path}: describes {dtype.name} data, which are not token ids: {_PREPARE_AGAIN}")
    _check_index_size(path, size, sequences, indices)
    lengths_at = _HEADER.size
    pointers_at = lengths_at + 4 * sequences
    indices_at = pointers_at + 8 * sequences
    return _Index(
        path,
        dtype,
        np.memmap(path, dtype="<i4", mode="r", offset=lengths_at, shape=(sequences,)),
        np.memmap(path, dtype="<i8", mode="r", offset=pointers_at, shape=(sequences,)),
        np.memmap(path, dtype="<i8", mode="r", offset=indices_at, shape=(indices,)),
    )


def _check_index_size(path: str, size: int, sequences: int, indices: int) -> None:
    expected = _HEADER.size + 12 * sequences + 8 * indices
    counts = f"{sequences} sequences and {indices} document indices"
    if size == expected + sequences and sequences:
        raise DataError(
            f"{path}: is a multimodal index (one mode per sequence): give a text dataset, "
            "made with tools/prepare_data.py"
        )
    if size != expected:
        state = "is truncated" if size < expected else "is too long"
        raise DataError(f"{path}: {state}, {size} bytes where {counts} take {expected}: {_PREPARE_AGAIN}")
    if sequences < 1 or indices < 2:
        raise DataError(f"{path}: holds no documents ({counts}): {_PREPARE_AGAIN}")


def _check_sequences(index: _Index) -> int:
    """Return the bytes that all sequences take."""
    itemsize = index.dtype.itemsize
    end = 0
    for start in range(0, len(index.lengths), _ENTRIES_PER_STEP):
        step = slice(start, start + _ENTRIES_PER_STEP)
        sizes = index.lengths[step].astype(np.int64) * itemsize
        if sizes.min() < 0:
            first = start + int(np.argmax(sizes < 0))
            raise DataError(f"{index.path}: sequence {first} has a negative length: {_PREPARE_AGAIN}")
        ends = end + np.cumsum(sizes)
        wrong = index.pointers[step] != ends - sizes
        if wrong.any():
            first = start + int(np.argmax(wrong))
            raise DataError(
                f"{index.path}: sequence {first} does not start where the one before it ends: "
                f"{_PREPARE_AGAIN}"
            )
        end = int(ends[-1])
    if end == 0:
        raise DataError(f"{index.path}: holds no tokens: {_PREPARE_AGAIN}")
    return end


def _check_documents(index: _Index, num_bytes: int) -> int:
    """Return the tokens of the longest document."""
    sequences = len(index.lengths)
    indices = index.document_indices
    if indices[0] != 0 or indices[-1] != sequences:
        raise DataError(
            f"{index.path}: document indices run from {indices[0]} to {indices[-1]}, not from 0 "
            f"to the {sequences} sequences: {_PREPARE_AGAIN}"
        )
    longest = 0
    for start in range(0, len(indices) - 1, _ENTRIES_PER_STEP):
        # One entry is shared with the next step: it ends this one's last document.
        bounds = np.asarray(indices[start : start + _ENTRIES_PER_STEP + 1])
        # Equal neighbours are right: an empty document has no sequence.
        falling = bounds[1:] < bounds[:-1]
        if falling.any():
            first = start + int(np.argmax(falling))
            raise DataError(
                f"{index.path}: document indices decrease after document {first}: {_PREPARE_AGAIN}"
            )
        offsets = index.pointers[np.minimum(bounds, sequences - 1)]
        offsets = np.where(bounds == sequences, num_bytes, offsets)
        longest = max(longest, int(np.diff(offsets).max()))
    return longest // index.dtype.itemsize


def _check_bin_size(paths: DatasetPaths, expected: int) -> None:
    try:
        size = os.path.getsize(paths.bin)
    except OSError as error:
        raise DataError(f"{paths.bin}: cannot be read ({error.strerror}): check the file") from error
    if size != expected:
        raise DataError(
            f"{paths.bin}: is {size} bytes, but {paths.idx} describes {expected}: "
            f"copy both files again, or {_PREPARE_AGAIN}"
        )
