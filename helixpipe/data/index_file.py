"""Reads Megatron's index of an indexed dataset, PREFIX.idx, which is little-endian:

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
    …+8D    int8[S], may be none   mode of each sequence
    ======  =====================  ==================================================

Megatron's modes tell kinds of sequences apart. In ours a document is a prompt, mode 1, on which there is no
loss, and a response, mode 0; without modes there is loss everywhere.

megatron-core checks this layout with assertions, or not at all: a damaged file gives a bare
``AssertionError`` or wrong tokens. Here each defect is a DataError, a ValueError, of one line that
names the file, the defect and the remedy.
"""

from __future__ import annotations

import hashlib
import os
import struct
from typing import NamedTuple

import numpy as np

from helixpipe.reliability.exit_codes import DataError

LOSS_MODE = 0
PROMPT_MODE = 1

PREPARE_AGAIN = "prepare the dataset again with helixpipe prepare"

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


class Index(NamedTuple):
    """An open index; the arrays are memory-mapped.

    Attributes:
        path: of the .idx file.
        dtype: of token ids in .bin.
        lengths: [S] tokens of each sequence.
        pointers: [S] byte offset of each sequence.
        document_indices: [D] first sequence of each document, then S.
        modes: [S] of each sequence; None for a dataset without.
    """

    path: str
    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    document_indices: np.ndarray
    modes: np.ndarray | None

    @property
    def num_documents(self) -> int:
        """Documents, empty ones too."""
        return len(self.document_indices) - 1

    @property
    def num_bytes(self) -> int:
        """Size of .bin."""
        return int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize

    def document_offsets(self, first: int, last: int) -> np.ndarray:
        """[last - first + 1] token offsets of documents ``first`` to ``last - 1``, and where those end."""
        bounds = np.asarray(self.document_indices[first : last + 1])
        sequences = len(self.lengths)
        offsets = self.pointers[np.minimum(bounds, sequences - 1)]
        return np.where(bounds == sequences, self.num_bytes, offsets) // self.dtype.itemsize


def open_index(path: str) -> Index:
    """Open an index; its size and header are checked, its entries are not.

    Raises:
        DataError: the file cannot be read, is damaged, or is no index of token ids.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            head = stream.read(_HEADER.size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the file") from error
    dtype, sequences, indices = _read_header(path, head, size)
    has_modes = _check_size(path, size, sequences, indices)
    lengths_at = _HEADER.size
    pointers_at = lengths_at + 4 * sequences
    indices_at = pointers_at + 8 * sequences
    modes_at = indices_at + 8 * indices
    return Index(
        path,
        dtype,
        np.memmap(path, dtype="<i4", mode="r", offset=lengths_at, shape=(sequences,)),
        np.memmap(path, dtype="<i8", mode="r", offset=pointers_at, shape=(sequences,)),
        np.memmap(path, dtype="<i8", mode="r", offset=indices_at, shape=(indices,)),
        np.memmap(path, dtype="<i1", mode="r", offset=modes_at, shape=(sequences,)) if has_modes else None,
    )


def hash_of_file(path: str) -> str:
    """SHA-256 of a file's content: the same for every copy of it."""
    found = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_ENTRIES_PER_STEP):
            found.update(block)
    return found.hexdigest()


def check_index(index: Index) -> int:
    """Read all entries of an index; the tokens of its longest document.

    Raises:
        DataError: an entry that does not fit the others.
    """
    _check_sequences(index)
    _check_modes(index)
    return _check_documents(index)


def _read_header(path: str, head: bytes, size: int) -> tuple[np.dtype, int, int]:
    """Type of the tokens, numbers of sequences and of document indices."""
    if not _MAGIC.startswith(head[: len(_MAGIC)]):
        raise DataError(f"{path}: is not a Megatron index (wrong magic): {PREPARE_AGAIN}")
    if len(head) < _HEADER.size:
        raise DataError(
            f"{path}: is truncated, {size} bytes where the header alone has {_HEADER.size}: {PREPARE_AGAIN}"
        )
    _, version, code, sequences, indices = _HEADER.unpack(head)
    if version != _VERSION:
        raise DataError(f"{path}: has version {version}, only version {_VERSION} is known: {PREPARE_AGAIN}")
    if code not in _DTYPES:
        raise DataError(f"{path}: has an unknown dtype code, {code}: {PREPARE_AGAIN}")
    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    if dtype.kind == "f":
        raise DataError(f"{path}: describes {dtype.name} data, which are not token ids: {PREPARE_AGAIN}")
    return dtype, sequences, indices


def _check_size(path: str, size: int, sequences: int, indices: int) -> bool:
    """True if the index has modes."""
    expected = _HEADER.size + 12 * sequences + 8 * indices
    counts = f"{sequences} sequences and {indices} document indices"
    has_modes = size == expected + sequences and sequences > 0
    if size != expected and not has_modes:
        state = "is truncated" if size < expected else "is too long"
        raise DataError(f"{path}: {state}, {size} bytes where {counts} take {expected}: {PREPARE_AGAIN}")
    if sequences < 1 or indices < 2:
        raise DataError(f"{path}: holds no documents ({counts}): {PREPARE_AGAIN}")
    return has_modes


def _check_modes(index: Index) -> None:
    if index.modes is None:
        return
    for start in range(0, len(index.modes), _ENTRIES_PER_STEP):
        modes = index.modes[start : start + _ENTRIES_PER_STEP]
        wrong = (modes != LOSS_MODE) & (modes != PROMPT_MODE)
        if wrong.any():
            first = start + int(np.argmax(wrong))
            raise DataError(
                f"{index.path}: is a multimodal index (sequence {first} has mode {index.modes[first]}): give "
                "a text dataset, made with helixpipe prepare"
            )


def _check_sequences(index: Index) -> None:
    itemsize = index.dtype.itemsize
    end = 0
    for start in range(0, len(index.lengths), _ENTRIES_PER_STEP):
        step = slice(start, start + _ENTRIES_PER_STEP)
        sizes = index.lengths[step].astype(np.int64) * itemsize
        if sizes.min() < 0:
            first = start + int(np.argmax(sizes < 0))
            raise DataError(f"{index.path}: sequence {first} has a negative length: {PREPARE_AGAIN}")
        ends = end + np.cumsum(sizes)
        wrong = index.pointers[step] != ends - sizes
        if wrong.any():
            first = start + int(np.argmax(wrong))
            raise DataError(
                f"{index.path}: sequence {first} does not start where the one before it ends: {PREPARE_AGAIN}"
            )
        end = int(ends[-1])
    if end == 0:
        raise DataError(f"{index.path}: holds no tokens: {PREPARE_AGAIN}")


def _check_documents(index: Index) -> int:
    """Return the tokens of the longest document."""
    sequences = len(index.lengths)
    indices = index.document_indices
    if indices[0] != 0 or indices[-1] != sequences:
        raise DataError(
            f"{index.path}: document indices run from {indices[0]} to {indices[-1]}, not from 0 "
            f"to the {sequences} sequences: {PREPARE_AGAIN}"
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
                f"{index.path}: document indices decrease after document {first}: {PREPARE_AGAIN}"
            )
        offsets = index.document_offsets(start, start + len(bounds) - 1)
        longest = max(longest, int(np.diff(offsets).max()))
    return longest
