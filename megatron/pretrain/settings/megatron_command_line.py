"""A command line of Megatron's training program as one of this program's."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

from megatron.pretrain.settings.megatron_flags import (
    ALIASES,
    NEEDLESS,
    OTHER_DEFAULTS,
    REFUSED,
    REMARKS,
)

_ANY, _SEVERAL = "", "+"


class Translated(NamedTuple):
    """A command line for this program's own parser.

    Attributes:
        words: of the command line.
        needless: flags that were left out, since they change nothing here, for people.
        foreign_flag: the first that is no option here, which only Megatron's command lines have; empty for
            none.
    """

    words: list[str]
    needless: tuple[str, ...] = ()
    foreign_flag: str = ""

    @property
    def defaults(self) -> dict[str, float | int]:
        """Megatron's, by field, if the command line is Megatron's: left out, an option must not change."""
        return {_field(name): value for name, value in OTHER_DEFAULTS.items()} if self.foreign_flag else {}


def note_of(needless: Iterable[str]) -> str:
    """What to tell of flags that change nothing; empty if there are none."""
    flags = dict.fromkeys(needless)
    return f"accepted, but change nothing here: {', '.join(flags)}" if flags else ""


def translate(command_line: Sequence[str]) -> Translated:
    """Replace aliases, leave out flags that change nothing, and refuse what is not supported.

    Args:
        command_line: arguments without the program's name.

    Raises:
        ValueError: one line: a flag that is refused, with what to use instead, or a needless one without its
            value.
    """
    words: list[str] = []
    needless: list[str] = []
    foreign: list[str] = []
    for flag, values in _groups(command_line):
        name = flag.removeprefix("--")
        if name in ALIASES:
            foreign.append(flag)
            words += [*ALIASES[name], *values]
        elif _is_needless(name, values):
            foreign.append(flag)
            remark = REMARKS.get(" ".join([name, *values]))
            needless.append(flag if remark is None else f"{' '.join([flag, *values])} ({remark})")
        elif name in _refusals():
            shown = " ".join([flag, *values[:1]])
            raise ValueError(f"{shown}: {_refusals()[name]}")
        else:
            words += [flag, *values]
    return Translated(words, tuple(needless), foreign[0] if foreign else "")


def other_defaults(translated: Translated, args: argparse.Namespace) -> str:
    """What to tell of options that were left out, where Megatron has another default; empty for none.

    Args:
        translated: the command line.
        args: as parsed.
    """
    given = {word.partition("=")[0] for word in translated.words}
    used = {name: f"--{name} {getattr(args, _field(name)):g}" for name in OTHER_DEFAULTS}
    left_out = [name for name in OTHER_DEFAULTS if f"--{name}" not in given]
    if not left_out:
        return ""
    if translated.foreign_flag:
        values = ", ".join(used[name] for name in left_out)
        return f"not given, and as in Megatron, whose command line has {translated.foreign_flag}: {values}"
    values = ", ".join(f"{used[name]} ({OTHER_DEFAULTS[name]:g} in Megatron)" for name in left_out)
    return f"not given, and another default than Megatron's: {values}"


def _field(name: str) -> str:
    return name.replace("-", "_")


def _groups(command_line: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag of Megatron's with its values, and every other word as it is."""
    known = {f"--{name}" for name in (*ALIASES, *_values_of_needless(), *_refusals())}
    words = list(command_line)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in known:
            yield word, []
            continue
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        yield flag, values


def _is_needless(name: str, values: list[str]) -> bool:
    allowed = _values_of_needless().get(name, ())
    if allowed is None:
        if values:
            raise ValueError(f"--{name} takes no value, and {values[0]!r} follows it; remove that")
        return True
    if not allowed:
        return False
    if not values or (len(values) > 1 and allowed != (_SEVERAL,)):
        raise ValueError(f"--{name} takes {'one value' if values else 'a value'}; it has {len(values)}")
    return allowed in ((_ANY,), (_SEVERAL,)) or values[0] in allowed


@cache
def _values_of_needless() -> dict[str, tuple[str, ...] | None]:
    """What may follow each flag that changes nothing; None for flags without a value."""
    found: dict[str, tuple[str, ...] | None] = {}
    for words in NEEDLESS.values():
        for word in words.split():
            name, equals, values = word.partition("=")
            found[name] = tuple(values.split(",")) if equals else None
    return found


@cache
def _refusals() -> dict[str, str]:
    """What to use instead, by flag."""
    return {name: reason for reason, names in REFUSED.items() for name in names.split()}
