"""Standard output as it is: a pipe whose reader has left, a terminal that knows no more than ASCII."""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import sys
from collections.abc import Callable

CLOSED_PIPE = 128 + signal.SIGPIPE  # as the shell reports a program that the signal has ended

_PLAIN = {
    "·": "-", "│": "|", "─": "-", "…": "...", "–": "-", "—": "-", "−": "-", "×": "x", "→": "->", "█": "#",
    "▉": "#", "▊": "#", "▋": "#", "▌": "+", "▍": "+", "▎": "+", "▏": "+", "“": '"', "”": '"', "’": "'",
}  # fmt: skip
_HANDLER = "helixpipe.plain"


def run_printing(run: Callable[[], int]) -> int:
    """Run a program that prints; its exit code, or ``CLOSED_PIPE`` if nobody reads any more (``| head``).

    Characters that the terminal does not know are printed as others that look alike, or escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        # Streams that take the place of the real ones, as in a notebook, have no encoding to fail on.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors=_HANDLER)  # type: ignore[union-attr]
    try:
        try:
            code = run()
        except SystemExit:
            # Of --help, whose text may still be buffered.
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more at its end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    return code


def prints(text: str) -> bool:
    """Whether standard output has all the characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = ""
    for character in error.object[error.start : error.end]:
        found += _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode()
    return found, error.end


codecs.register_error(_HANDLER, _plain)
