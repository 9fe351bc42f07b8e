"""What a corpus is made from: text, JSON lines, Parquet and saved datasets, read piece by piece."""

from __future__ import annotations

import codecs
import fnmatch
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from helixpipe.data.prepare import parquet, saved_datasets
from helixpipe.data.prepare.formats import (
    LONGEST_LINE,
    Format,
    damage_of,
    inspect_file,
    open_source,
    refuse_damaged,
)
from helixpipe.data.prepare.pieces import Piece, cut
from helixpipe.json_input import parse_json

_BLOCK_BYTES = 1 << 20


class Source(NamedTuple):
    """One input file, or a saved dataset's folder; ``compression`` is empty for a plain one."""

    path: str
    size: int
    format: Format
    compression: str


@dataclass(frozen=True)
class Reading:
    """How documents are read.

    Attributes:
        json_key: key of the text in a JSON line; where there is no such key, the parts between its points are
            those of objects within each other.
        prompt_key: key of the prompt before the text; None for documents without.
        limit: characters of a piece; None for documents in one piece.
    """

    json_key: str
    prompt_key: str | None = None
    limit: int | None = None


def find_sources(
    inputs: Sequence[str],
    pattern: str = "*",
    exclude: Sequence[str] = (),
    own: Sequence[str] = (),
    wanted: Format | None = None,
) -> list[Source]:
    """List the input files, in the given order; a directory's files sorted by their path.

    Args:
        inputs: Files and directories. A folder that the library ``datasets`` has saved is one source.
        pattern: Glob for the names of a directory's files.
        exclude: Globs for the names of files and folders to leave out of a directory.
        own: Files that are not taken from a directory, and neither are temporaries of them: what
            an earlier run wrote must not become the next one's input.
        wanted: Format of all files; None to look into each.

    Raises:
        ValueError: An input is missing, cannot be read or is neither text nor JSON lines, or a
            directory has no matching file.
    """
    sources: list[Source] = []
    for path in inputs:
        try:
            if os.path.isdir(path) and saved_datasets.is_saved_dataset(path):
                sources.append(_saved_dataset(path, wanted))
                continue
            if os.path.isdir(path):
                found = _walk(path, pattern, exclude, own)
                if not found:
                    raise ValueError(
                        f"{path}: no file matches --pattern {pattern!r}"
                        + (" after --exclude" if exclude else "")
                        + ": give another pattern or directory"
                    )
            elif os.path.isfile(path):
                if any(os.path.exists(file) and os.path.samefile(file, path) for file in own):
                    raise ValueError(f"{path}: is a file of the dataset to be written: give another --input")
                found = [path]
            elif os.path.lexists(path):
                # A pipe cannot be read twice, once to train and once to encode.
                raise ValueError(f"{path}: is neither a file nor a directory: give one of these")
            else:
                raise ValueError(f"{path}: no such file or directory: correct --input")
            sources.extend(Source(file, os.path.getsize(file), *inspect_file(file, wanted)) for file in found)
        except OSError as error:
            raise _unreadable(error.filename or path, error) from error
    return sources


def require_jsonl(sources: Sequence[Source]) -> None:
    """Refuse text files, which have no prompts.

    Raises:
        ValueError: There is one.
    """
    for source in sources:
        if source.format is Format.TEXT:
            raise ValueError(
                f"{source.path}: a text file has no prompts: give JSON lines or Parquet with --prompt-key, "
                "or a --pattern that takes them alone"
            )


def read_pieces(sources: Iterable[Source], reading: Reading, undecodable: set[str]) -> Iterator[Piece]:
    """Yield the documents of the input in order, empty ones too, in pieces.

    Args:
        sources: Files to read.
        reading: Keys and sizes.
        undecodable: Receives the files in which something had to be replaced by U+FFFD.

    Raises:
        ValueError: A file cannot be read or is mostly no text, or a line has no text under a key.
    """
    for source in sources:
        read = _READ[source.format]
        try:
            yield from read(source, reading, undecodable)
        except OSError as error:
            raise _unreadable(source.path, error) from error


def _walk(root: str, pattern: str, exclude: Sequence[str], own: Sequence[str]) -> list[str]:
    def is_excluded(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, glob_) for glob_ in exclude)

    def fail(error: OSError) -> None:
        # By default os.walk passes over a folder that it cannot list.
        raise error

    own_paths = tuple(os.path.realpath(path) for path in own)
    own_temporaries = tuple(f"{path}.tmp-" for path in own_paths)
    found = []
    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not is_excluded(name)]
        for name in files:
            if not fnmatch.fnmatchcase(name, pattern) or is_excluded(name):
                continue
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            if real in own_paths or real.startswith(own_temporaries):
                continue
            if os.path.isfile(path):
                found.append(path)
    return sorted(found, key=lambda path: path.split(os.sep))


def _read_text(source: Source, reading: Reading, undecodable: set[str]) -> Iterator[Piece]:
    with open_source(source.path, source.compression) as (stream, position):
        reported, before = 0, None
        for text in cut(_decoded(stream, source.path, undecodable), reading.limit):
            if before is not None:
                yield Piece(before, position() - reported, is_last=False)
                reported = position()
            before = text
        assert before is not None
        yield Piece(before, source.size - reported)


def _decoded(stream: IO[bytes], path: str, undecodable: set[str]) -> Iterator[str]:
    """A text file block by block; what is no UTF-8 is replaced, unless it is most of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    damage = characters = 0
    overlap = b""
    while block := stream.read(_BLOCK_BYTES):
        text = decoder.decode(block)
        # A character may begin in the block before.
        damage += damage_of(overlap + block, text)
        characters += len(text)
        overlap = (overlap + block)[-2:]
        yield text
    text = decoder.decode(b"", final=True)
    damage += text.count("\ufffd")
    refuse_damaged(path, damage, characters + len(text))
    if damage:
        undecodable.add(path)
    yield text


def _read_json_lines(source: Source, reading: Reading, undecodable: set[str]) -> Iterator[Piece]:
    path = source.path
    with open_source(path, source.compression) as (stream, position):
        reported = 0
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), start=1):
            place = f"{path}:{number}"
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{place}: is longer than {LONGEST_LINE >> 20} MiB: give it as a text file")
            if line.isspace():
                continue
            value = _json_object(line, place, reading.json_key)
            prompt, text = _texts(value, place, reading, path, undecodable)
            read, reported = position() - reported, position()
            yield from _pieces(prompt, text, reading.limit, read)


def _saved_dataset(folder: str, wanted: Format | None) -> Source:
    if wanted not in (None, Format.DATASET):
        raise ValueError(f"{folder}: is a saved dataset: leave --format out")
    return Source(folder, saved_datasets.size_of(folder), Format.DATASET, "")


_ROWS_OF = {Format.PARQUET: parquet.read_rows, Format.DATASET: saved_datasets.read_rows}


def _read_rows(source: Source, reading: Reading, undecodable: set[str]) -> Iterator[Piece]:
    keys = [key for key in (reading.prompt_key, reading.json_key) if key is not None]
    read, reported = 0.0, 0
    for number, (row, share) in enumerate(_ROWS_OF[source.format](source.path, keys), start=1):
        prompt, text = _texts(row, f"{source.path}: row {number}", reading, source.path, undecodable)
        read += share * source.size
        yield from _pieces(prompt, text, reading.limit, int(read) - reported)
        reported = int(read)


# By format, what reads a file piece by piece.
_READ = {
    Format.TEXT: _read_text,
    Format.JSONL: _read_json_lines,
    Format.PARQUET: _read_rows,
    Format.DATASET: _read_rows,
}


def _texts(
    value: dict[str, Any], place: str, reading: Reading, path: str, undecodable: set[str]
) -> tuple[str, str]:
    """Prompt and text of an object; the prompt is empty where there is none."""

    def text_of(key: str, option: str) -> str:
        text = _json_text(value, place, key, option)
        if text.isascii():
            return text
        # JSON can escape half of a surrogate pair, which no encoder takes.
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if whole != text:
            undecodable.add(path)
        return whole

    prompt_key = reading.prompt_key
    prompt = "" if prompt_key is None else text_of(prompt_key, "--prompt-key")
    return prompt, text_of(reading.json_key, "--json-key" if prompt_key is None else "--response-key")


def _pieces(prompt: str, text: str, limit: int | None, input_bytes: int) -> Iterator[Piece]:
    for part in cut([prompt], limit) if prompt else ():
        yield Piece(part, 0, is_prompt=True, is_last=False)
    *before, last = cut([text], limit)
    for part in before:
        yield Piece(part, 0, is_last=False)
    yield Piece(last, input_bytes)


def _json_object(line: bytes, place: str, json_key: str) -> dict[str, Any]:
    try:
        value = parse_json(line.decode("utf-8-sig"), place)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: is not UTF-8 ({error.reason}): convert the file") from error
    except ValueError as error:
        raise ValueError(
            f"{error}: a file of JSON lines has one object on each line; --format text takes it as one "
            "document"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{place}: is not a JSON object: write it as {{{json_key!r}: ...}}")
    return value


def _json_text(value: dict[str, Any], place: str, key: str, option: str) -> str:
    text: Any = value
    # A key may hold points itself.
    for part in (key,) if key in value else key.split("."):
        if not isinstance(text, dict) or part not in text:
            keys = ", ".join(repr(found) for found in list(value)[:5]) or "none"
            raise ValueError(f"{place}: has no key {key!r} (keys: {keys}): set {option}")
        text = text[part]
    if not isinstance(text, str):
        raise ValueError(f"{place}: the value of {key!r} is not a string: set {option} to the text")
    return text


def _unreadable(path: str, error: OSError) -> ValueError:
    return ValueError(f"{path}: cannot be read ({error.strerror}): check --input")
