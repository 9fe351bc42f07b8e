"""What an input file holds, found by looking into it: Parquet, or text or JSON lines, plain or compressed.

A file's name decides nothing, except that one called .json, .jsonl or .ndjson must hold JSON lines.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from enum import Enum
from typing import IO, Any, NamedTuple

from helixpipe.json_input import parse_json


class Format(str, Enum):
    """How documents stand in a file."""

    TEXT = "text"  # the file is one document
    JSONL = "jsonl"  # every line is a JSON object with one document
    PARQUET = "parquet"  # every row is one
    DATASET = "dataset"  # so it is; a folder of the library datasets


class Inspected(NamedTuple):
    """What a look into a file has found; ``compression`` is empty for a plain one."""

    format: Format
    compression: str


# A line is held in memory, as bytes and as text.
LONGEST_LINE = 1 << 28
# A larger share of bytes that are no UTF-8 text is no damage that can be passed over.
MOST_DAMAGE = 0.3

_HEAD_BYTES = 1 << 16
_COMPRESSIONS: dict[bytes, str] = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
_OPEN: dict[str, Callable[..., Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_PARQUET = b"PAR1"
_BINARY = {
    b"\x28\xb5\x2f\xfd": "Zstandard data: decompress it first",
    b"\x04\x22\x4d\x18": "LZ4 data: decompress it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"PK\x03\x04": "a zip archive, or a file made of one: unpack or convert it first",
    b"Rar!\x1a\x07": "a RAR archive: unpack it first",
    _PARQUET: "Parquet: leave --format out",
    b"ARROW1": "Arrow: convert it to Parquet",
    b"\x89HDF\r\n": "HDF5: convert it to JSON lines",
    b"SQLite format 3\x00": "an SQLite database: convert it to JSON lines",
    b"%PDF-": "PDF: convert it to text",
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8",
}
_TAR, _TAR_AT = b"ustar", 257
_CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b")) + b"\x7f"
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz")


def inspect_file(path: str, wanted: Format | None = None) -> Inspected:
    """Look into a file.

    Args:
        path: of the file.
        wanted: the format to read it as; None to find it.

    Raises:
        ValueError: it is neither Parquet nor text nor JSON lines, or its compression is damaged.
        OSError: it cannot be read.
    """
    with open(path, "rb") as plain:
        head = plain.read(_HEAD_BYTES)
    is_parquet = head.startswith(_PARQUET)
    if is_parquet and wanted in (None, Format.PARQUET):
        return Inspected(Format.PARQUET, "")
    if wanted is Format.DATASET:
        raise ValueError(f"{path}: is a file, and --format dataset takes folders: leave --format out")
    if wanted is Format.PARQUET:
        raise ValueError(f"{path}: is no Parquet: leave --format out, or leave it out with --exclude")
    compression = next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), "")
    if compression:
        with open_source(path, compression) as (stream, _):
            head = stream.read(_HEAD_BYTES)
        if head.startswith(tuple(_COMPRESSIONS)):
            raise ValueError(f"{path}: is compressed twice: decompress it once")
    _refuse_binary(path, head)
    if wanted is not None:
        return Inspected(wanted, compression)
    is_jsonl = _without_compression(path).endswith(_JSON_SUFFIXES)
    if not is_jsonl and head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        with open_source(path, compression) as (stream, _):
            is_jsonl = _begins_with_object(stream)
    return Inspected(Format.JSONL if is_jsonl else Format.TEXT, compression)


@contextlib.contextmanager
def open_source(path: str, compression: str) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The content of a file, and a function that tells how many bytes of the file were read for it.

    Raises:
        ValueError: in the block, damaged compression.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as plain:
        if not compression:
            yield plain, plain.tell
            return
        try:
            with _OPEN[compression](plain) as stream:
                yield stream, plain.tell
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise _damaged(path, compression, error) from error
        except OSError as error:
            # Decompressors raise it without a number for damaged data.
            if error.errno is not None:
                raise
            raise _damaged(path, compression, error) from error


def damage_of(raw: bytes, text: str) -> int:
    """Characters of ``text`` that took the place of bytes of ``raw`` which were no UTF-8."""
    # The text may hold U+FFFD of its own.
    return text.count("\ufffd") - raw.count(b"\xef\xbf\xbd") if "\ufffd" in text else 0


def refuse_damaged(path: str, damage: int, characters: int) -> None:
    """``ValueError`` for a text of which too large a part is no text."""
    if damage > MOST_DAMAGE * characters:
        raise ValueError(
            f"{path}: is no UTF-8 text, {damage} of {characters} characters cannot be decoded: convert it, "
            "or leave it out with --exclude or --pattern"
        )


def _refuse_binary(path: str, head: bytes) -> None:
    for magic, what in _BINARY.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: is {what}, or leave it out with --exclude or --pattern")
    if head[_TAR_AT:].startswith(_TAR):
        raise ValueError(f"{path}: is a tar archive: unpack it first")
    text = head.decode("utf-8", "replace")
    control = len(head) - len(head.translate(None, _CONTROL))
    if b"\0" in head or control > MOST_DAMAGE * len(head):
        raise ValueError(
            f"{path}: is a binary file: convert it to text, or leave it out with --exclude or --pattern"
        )
    # The end of the head may stand in a character.
    refuse_damaged(path, damage_of(head, text) - 1, len(text))


def _without_compression(path: str) -> str:
    return next((path.removesuffix(end) for end in _COMPRESSED_SUFFIXES if path.endswith(end)), path)


def _begins_with_object(stream: IO[bytes]) -> bool:
    line = b"\n"
    while line.isspace():
        line = stream.readline(LONGEST_LINE)
    try:
        return isinstance(parse_json(line.decode("utf-8-sig"), "the first line"), dict)
    except ValueError:
        return False


def _damaged(path: str, compression: str, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: its {compression} data are damaged ({error}): copy or compress the file again"
    )
