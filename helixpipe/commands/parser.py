"""Command lines whose errors are one line: the same for the planner and for training."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from helixpipe.reliability.exit_codes import BAD_USAGE

_UNKNOWN = "unrecognized arguments: "


class UsageError(ValueError):
    """A command line that cannot be read.

    Attributes:
        program: the command that it was given to.
    """

    def __init__(self, message: str, program: str) -> None:
        super().__init__(message)
        self.program = program


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and suggests the flag that was meant.

    It knows no abbreviations, as Megatron's does not: a flag added later must not change what a script means.
    """

    def __init__(self, **options: object) -> None:
        super().__init__(**{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does, which however takes ``--flag=--`` for a flag with an empty list."""
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word.removesuffix('=--')}: '--' is no value")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise :class:`UsageError`."""
        raise UsageError(f"{message}{self._suggestion(message)}", self.prog)

    def _suggestion(self, message: str) -> str:
        if not message.startswith(_UNKNOWN):
            return ""
        unknown = message.removeprefix(_UNKNOWN).split()[0].partition("=")[0]
        close = difflib.get_close_matches(unknown, self._flags(), n=1)
        return f"; did you mean {close[0]}?" if close else f"; see {self.prog} --help"

    def _flags(self) -> list[str]:
        """Of this parser and of its commands."""
        flags: list[str] = []
        for action in self._actions:
            flags += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for parser in action.choices.values() for flag in parser._flags()]
        return flags


class ScriptParser(Parser):
    """Of a program that leaves errors of its command line to its parser: one line, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Exit with one line on stderr."""
        self.exit(BAD_USAGE, f"{self.prog}: error: {message}{self._suggestion(message)}\n")


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A function that raises ``ValueError``, as the ``type`` of an option: its message is what is shown."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def flag_of(name: str) -> str:
    """The flag of an argument."""
    return "--" + name.replace("_", "-")
