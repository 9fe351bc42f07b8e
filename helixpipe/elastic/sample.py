"""Batches like real data, made without chance, to compare plans on."""

from __future__ import annotations

from math import exp, log
from statistics import NormalDist

_ONE_IN_HUNDRED = 0.99


def skewed_lengths(
    count: int = 256, *, median: int = 3000, long: int = 26000, longest: int = 80000
) -> tuple[int, ...]:
    """Lengths whose logarithms are normal, as those of documents nearly are, and one that stands out.

    Args:
        count: sequences.
        median: tokens of the middle one.
        long: tokens that one in a hundred exceeds.
        longest: tokens of the last.
    """
    normal = NormalDist()
    spread = log(long / median) / normal.inv_cdf(_ONE_IN_HUNDRED)
    lengths = [max(1, round(median * exp(spread * normal.inv_cdf((i + 0.5) / count)))) for i in range(count)]
    lengths[-1] = max(longest, lengths[-1])
    return tuple(lengths)


def short_tailed_lengths(count: int = 256, *, shortest: int = 2048, longest: int = 8192) -> tuple[int, ...]:
    """Lengths spread evenly between two that are not far apart: here slicing has nothing to gain."""
    return tuple(shortest + (longest - shortest) * i // max(1, count - 1) for i in range(count))
