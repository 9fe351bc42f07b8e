"""Rows of bad values for every option of a parser, and what each has to end with."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helixpipe.commands.parser import ScriptParser, UsageError
from helixpipe.commands.ranges import Real, Whole

# No number in any of the forms that an option takes; Python's int and float take some of them.
NO_NUMBERS = (
    "", " ", "nine", "1 2", "0x10", "1_0", "1,000", "nan", "-nan", "inf", "-inf", "1e999", "-1e999",
    "--", "+", "١٢", "½", "9" * 5000, "1" + "0" * 400,
)  # fmt: skip
# Options whose words, or none, are looked up in files and tables: tests/commands/test_option_ranges.py.
LOOKED_UP = {"dry_run"}
NO_WHOLE_NUMBERS = ("1.5", "1.0", "1e3", " 4", "4 ")


def parts_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of its subcommands, or itself if it has none."""
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [part for action in commands for part in action.choices.values()] or [parser]


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """All but ``--help``."""
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def numbers_of(parser: argparse.ArgumentParser) -> list[Any]:
    """Options with a declared range."""
    return [action for action in options_of(parser) if isinstance(action.type, (Whole, Real))]


def bad_numbers(kind: Whole | Real) -> Iterator[str]:
    """No numbers, and those beyond a range."""
    yield from NO_NUMBERS
    if isinstance(kind, Whole):
        yield from NO_WHOLE_NUMBERS
        yield from (str(kind.least - 1), str(kind.most + 1), "-1" if kind.least >= 0 else str(kind.least - 9))
        return
    for limit, step in (
        (kind.least, -1),
        (kind.above, 0),
        (kind.above, -1),
        (kind.below, 0),
        (kind.below, 1),
    ):
        if limit is not None:
            yield repr(limit + step)
    if kind.most is not None:
        yield repr(kind.most * 1.001)


def rows(action: argparse.Action) -> list[list[str]]:
    """Words of the command line that misuse one option."""
    if not action.option_strings:
        return [[]]  # left out
    flag = action.option_strings[0]
    if action.nargs == 0:
        return [[f"{flag}=yes"]]
    found = [] if action.nargs == "?" else [[flag]]  # without its value
    if isinstance(action.type, (Whole, Real)):
        found += [[f"{flag}={value}"] for value in bad_numbers(action.type)]
    elif action.choices is not None:
        found += [[f"{flag}={value}"] for value in ("", "no-such", "1")]
    elif action.type not in (None, Path):
        found += [[f"{flag}={value}"] for value in NO_NUMBERS]
    return found


def refusal(parser: argparse.ArgumentParser, words: list[str], capsys: Any) -> str:
    """The one line with which a parser ends."""
    if isinstance(parser, ScriptParser):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(words)
        output = capsys.readouterr()
        assert (stop.value.code, output.out) == (2, "")
        return output.err.removesuffix("\n")
    with pytest.raises(UsageError) as caught:
        parser.parse_args(words)
    return f"{caught.value.program}: error: {caught.value}"


def check_ranges(parser: argparse.ArgumentParser) -> None:
    """Numbers declare their range, and defaults lie in it."""
    bare = [action.option_strings[0] for action in options_of(parser) if action.type in (int, float, complex)]
    assert bare == []
    for action in numbers_of(parser):
        default = action.default
        for value in default if isinstance(default, list) else [default]:
            assert value is None or action.type(str(value)) == value, f"{action.dest} has no valid default"


def check_bad_values(parser: argparse.ArgumentParser, capsys: Any) -> None:
    """Every option has a row, and each row ends in one line that names the option."""
    for action in options_of(parser):
        assert rows(action) or action.dest in LOOKED_UP, f"{action.dest} has no row"
        for words in rows(action):
            line = refusal(parser, words, capsys)
            assert line.count("\n") == 0
            assert line.startswith(f"{parser.prog}: error: ")
            name = action.option_strings[0] if action.option_strings else action.metavar
            assert name is not None
            assert str(name) in line
            assert len(line) < 400
