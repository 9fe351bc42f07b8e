"""Outputs beside the checkpoints: what goes wrong with them is said once and never ends training."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from helixpipe.json_input import parse_object

# Longer than any line of a metrics file.
_LINE_BYTES = 1 << 20
# What stands in a folder of timelines.
_OF_ITERATION = re.compile(r"(?:iteration|plan)_([0-9]{7,})\.json")
_OF_JOB = re.compile(r"(?:plan|arguments|profile_rank[0-9]+)\.json")


def say(text: str) -> None:
    """Print a line; standard output may be a full disk, or a pipe that nobody reads any more."""
    try:
        print(text, flush=True)
    except OSError as error:
        # Also what is left in the buffer would fail once more at the exit.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        sys.stderr.write(f"standard output cannot be written ({error.strerror}); training goes on\n")


class SideOutput:
    """Writes to one path that may fail.

    Args:
        path: where to, for the warning; None for one that is never written to.
        what: is written, in the plural.
    """

    def __init__(self, path: Path | None, what: str) -> None:
        self._path = path
        self._what = what
        self._lost = 0

    def attempt(self, write: Callable[[], object]) -> None:
        """Write; a failure is said if it is the first, and counted."""
        try:
            write()
        except OSError as error:
            if not self._lost:
                say(
                    f"warning: {self._what} cannot be written to {self._path} ({error.strerror or error}); "
                    "training goes on"
                )
            self._lost += 1

    def summary(self) -> str:
        """What is missing; empty if nothing is."""
        return f"{self._lost} {self._what} are missing in {self._path}" if self._lost else ""


class MetricsFile:
    """A file of one JSON object per line and iteration, which only grows.

    Where training goes back, the lines of the iterations that come again move to ``PATH.set-aside``.

    Args:
        path: of the file; it need not exist.
        iteration: the last finished one.

    Raises:
        OSError: it cannot be opened, or lines cannot be moved.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _set_aside_later_lines(path, iteration)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def append(self, line: str) -> None:
        """Write a line whole, or not at all."""
        data = f"{line}\n".encode()
        size = os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise


def replace_file(path: Path, text: str) -> None:
    """Write a file whole, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def set_aside_later_files(folder: Path, iteration: int) -> None:
    """Move what another branch or job has left in a folder of timelines into ``FOLDER/set-aside``.

    Args:
        folder: it need not exist.
        iteration: the last finished one: files of later ones come again. With 0 all do.

    Raises:
        OSError: a file cannot be moved.
    """
    later = [path for path in folder.glob("*.json") if _comes_again(path.name, iteration)]
    if not later:
        return
    aside, count = folder / "set-aside", 1
    while aside.exists():
        count += 1
        aside = folder / f"set-aside-{count}"
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)


def _comes_again(name: str, iteration: int) -> bool:
    found = _OF_ITERATION.fullmatch(name)
    if found is None:
        return iteration == 0 and _OF_JOB.fullmatch(name) is not None
    return int(found[1]) > iteration


def _set_aside_later_lines(path: Path, iteration: int) -> None:
    aside, kept = path.with_name(f"{path.name}.set-aside"), path.with_name(f"{path.name}.tmp")
    with path.open("rb") as stream:
        if all(_is_kept(line, iteration) for line in iter(lambda: stream.readline(_LINE_BYTES), b"")):
            return
        stream.seek(0)
        # First the copies: whatever happens then, no line is lost.
        with aside.open("ab") as later, kept.open("wb") as earlier:
            for line in iter(lambda: stream.readline(_LINE_BYTES), b""):
                (earlier if _is_kept(line, iteration) else later).write(line.removesuffix(b"\n") + b"\n")
            for copy in (later, earlier):
                copy.flush()
                os.fsync(copy.fileno())
    kept.replace(path)


def _is_kept(line: bytes, iteration: int) -> bool:
    """Whether a line is of an iteration that has been gone on from; the last of a killed job may be cut."""
    try:
        return bool(parse_object(line, "a line")["iteration"] <= iteration) and line.endswith(b"\n")
    except (ValueError, KeyError, TypeError):
        return False
