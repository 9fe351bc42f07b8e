"""Numbers of a command line: each option declares the range that it understands, and nothing else gets past.

    add("--num-layers", type=Whole())
    add("--adam-beta1", type=Real(least=0.0, below=1.0))

Python's own ``int`` and ``float`` take ``1_0``, ``nan`` and numbers of any size, which an option then has to
make sense of far from where they were typed.
"""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError
from dataclasses import dataclass

# Sizes go into 32-bit fields of files and messages; their products stay below 64 bits.
LARGEST = 2**31 - 1

_WHOLE = re.compile(r"[+-]?[0-9]+", re.ASCII)
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)
# Longer than any number that is meant, and short enough for every conversion.
_MOST_CHARACTERS = 64


@dataclass(frozen=True)
class Whole:
    """A whole number in decimal digits; the ``type`` of an argparse option.

    Attributes:
        least, most: smallest and largest value that is taken.
        word: a word that is taken in the place of a number, such as ``auto``; None for none.
    """

    least: int = 1
    most: int = LARGEST
    word: str | None = None

    def __call__(self, text: str) -> int | str:
        """The number, or the word.

        Raises:
            ArgumentTypeError: anything else.
        """
        if self.word is not None and text == self.word:
            return text
        if len(text) > _MOST_CHARACTERS or not _WHOLE.fullmatch(text):
            other = "" if self.word is None else f", or {self.word}"
            raise ArgumentTypeError(
                f"{_short(text)} is not a whole number; give {self.least} to {self.most}{other}"
            )
        value = int(text)
        if value < self.least:
            raise ArgumentTypeError(f"must be at least {self.least}, not {value}")
        if value > self.most:
            raise ArgumentTypeError(f"must be at most {self.most}, not {value}")
        return value


@dataclass(frozen=True)
class Real:
    """A finite number; the ``type`` of an argparse option.

    Attributes:
        least, most: smallest and largest value that is taken; None for no limit.
        above, below: values between which it must lie, themselves not taken; None for no limit.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __call__(self, text: str) -> float:
        """The number.

        Raises:
            ArgumentTypeError: no number, one that is not finite, or one outside the range.
        """
        if len(text) > _MOST_CHARACTERS or not _REAL.fullmatch(text) or not math.isfinite(float(text)):
            raise ArgumentTypeError(f"{_short(text)} is not a finite number; it must be {self.meaning}")
        value = float(text)
        holds = (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        if not holds:
            raise ArgumentTypeError(f"must be {self.meaning}, not {value:g}")
        return value

    @property
    def meaning(self) -> str:
        """The range in words."""
        limits = (
            ("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below),
        )  # fmt: skip
        return " and ".join(f"{word} {value:.12g}" for word, value in limits if value is not None) or "finite"


def _short(text: str) -> str:
    return repr(text) if len(text) <= _MOST_CHARACTERS else f"{text[:16]!r}… of {len(text)} characters"


RANKS = Whole(most=2**16)
LAYERS = Whole(most=2**14)
REPEATS = Whole(most=10**6)  # of a measurement
GIBIBYTES = Real(above=0.0, most=2.0**20)  # of one device's memory
SEED = Whole(least=0, most=2**32 - 1)  # what NumPy's generators take
