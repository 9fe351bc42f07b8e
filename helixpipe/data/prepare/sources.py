"""What a corpus is made from: files and folders of text and JSONL, read document by document."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

JSON_SUFFIXES = (".jsonl", ".json")


class Source(NamedTuple):
    """One input file."""

    path: str
    size: int
    is_jsonl: bool


class Document(NamedTuple):
    """One text, the prompt before it, and the bytes of input that were read to get them."""

    text: str
    input_bytes: int
    prompt: str = ""


def find_sources(
    inputs: Sequence[str],
    pattern: str = "*",
    exclude: Sequence[str] = (),
    own: Sequence[str] = (),
) -> list[Source]:
    """List the input files, in the given order; a directory's files sorted by their path.

    Args:
        inputs: Files and directories.
        pattern: Glob for the names of a directory's files.
        exclude: Globs for the names of files and folders to leave out of a directory.
        own: Files that are not taken from a directory, and neither are temporaries of them: what
            an earlier run wrote must not become the next one's input.

    Raises:
        ValueError: An input is missing or cannot be read, or a directory has no matching file.
    """
    sources: list[Source] = []
    for path in inputs:
        try:
            if os.path.isdir(path):
                found = _walk(path, pattern, exclude, own)
                if not found:
                    raise ValueError(
                        f"{path}: no file matches --pattern {pattern!r}"
                        + (" after --exclude" if exclude else "")
                        + ": give another pattern or directory"
                    )
            elif os.path.isfile(path):
                found = [path]
            elif os.path.lexists(path):
                # A pipe cannot be read twice, once to train and once to encode.
                raise ValueError(f"{path}: is neither a file nor a directory: give one of these")
            else:
                raise ValueError(f"{path}: no such file or directory: correct --input")
            sources.extend(
                Source(file, os.path.getsize(file), file.endswith(JSON_SUFFIXES)) for file in found
            )
        except OSError as error:
            raise _unreadable(error.filename or path, error) from error
    return sources


def require_jsonl(sources: Sequence[Source]) -> None:
    """Refuse text files, which have no prompts.

    Raises:
        ValueError: There is one.
    """
    for source in sources:
        if not source.is_jsonl:
            raise ValueError(
                f"{source.path}: a text file has no prompts: give {' or '.join(JSON_SUFFIXES)} files with "
                "--prompt-key, or a --pattern that takes them alone"
            )


def read_documents(
    sources: Iterable[Source], json_key: str, undecodable: set[str], prompt_key: str | None = None
) -> Iterator[Document]:
    """Yield the documents of the input in order, empty ones too.

    Args:
        sources: Files to read.
        json_key: Key of the text in a JSONL object.
        undecodable: Receives the files in which something had to be replaced by U+FFFD.
        prompt_key: Key of the prompt before the text; None for documents without.

    Raises:
        ValueError: A file cannot be read, or a JSONL line has no text under a key.
    """
    for source in sources:
        try:
            if source.is_jsonl:
                yield from _read_json_lines(source.path, json_key, prompt_key, undecodable)
            else:
                with open(source.path, "rb") as stream:
                    data = stream.read()
                text = data.decode("utf-8", errors="replace")
                # The text may hold U+FFFD of its own: only a failed round trip is damage.
                if "\ufffd" in text and text.encode() != data:
                    undecodable.add(source.path)
                yield Document(text, len(data))
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


def _read_json_lines(
    path: str, json_key: str, prompt_key: str | None, undecodable: set[str]
) -> Iterator[Document]:
    def text_of(value: dict[str, Any], key: str, option: str) -> str:
        text = _json_text(value, place, key, option)
        if text.isascii():
            return text
        # JSON can escape half of a surrogate pair, which no encoder takes.
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if whole != text:
            undecodable.add(path)
        return whole

    with open(path, "rb") as stream:
        unreported = 0
        for number, line in enumerate(stream, start=1):
            unreported += len(line)
            if line.isspace():
                continue
            place = f"{path}:{number}"
            value = _json_object(line, place, json_key)
            prompt = "" if prompt_key is None else text_of(value, prompt_key, "--prompt-key")
            option = "--json-key" if prompt_key is None else "--response-key"
            yield Document(text_of(value, json_key, option), unreported, prompt)
            unreported = 0


def _json_object(line: bytes, place: str, json_key: str) -> dict[str, Any]:
    try:
        value: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: is not UTF-8 ({error.reason}): convert the file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{place}: is not JSON ({error}): a JSONL file has one object on each line"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{place}: is not a JSON object: write it as {{{json_key!r}: ...}}")
    return value


def _json_text(value: dict[str, Any], place: str, key: str, option: str) -> str:
    if key not in value:
        keys = ", ".join(repr(found) for found in list(value)[:5]) or "none"
        raise ValueError(f"{place}: has no key {key!r} (keys: {keys}): set {option}")
    text = value[key]
    if not isinstance(text, str):
        raise ValueError(f"{place}: the value of {key!r} is not a string: set {option} to the text")
    return text


def _unreadable(path: str, error: OSError) -> ValueError:
    return ValueError(f"{path}: cannot be read ({error.strerror}): check --input")
