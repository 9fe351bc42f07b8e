"""What a histogram of lengths shows, and the numbers beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from helixpipe.data.samples import Integers


@dataclass(frozen=True)
class Bin:
    """Samples of ``first`` to ``last`` tokens, how many they are and the tokens that they have."""

    first: int
    last: int
    samples: int
    tokens: int


@dataclass(frozen=True)
class LengthStatistics:
    """Of samples of one or more tokens.

    Attributes:
        samples, tokens: sums.
        median, p90, p99, longest: lengths that so many samples do not exceed.
        mean: tokens per sample.
        longest_share: share of the tokens that the longest hundredth of the samples, at least one, has.
        bins: every power of two from the shortest sample's to the longest's.
    """

    samples: int
    tokens: int
    median: int
    mean: float
    p90: int
    p99: int
    longest: int
    longest_share: float
    bins: tuple[Bin, ...]


def length_statistics(lengths: Integers) -> LengthStatistics:
    """Statistics of ``lengths``, [n] tokens of each sample, n and they above 0."""
    tokens = int(lengths.sum())
    median, p90, p99 = np.quantile(lengths, (0.5, 0.9, 0.99), method="inverted_cdf")
    ordered = np.sort(lengths)
    return LengthStatistics(
        samples=len(lengths),
        tokens=tokens,
        median=int(median),
        mean=tokens / len(lengths),
        p90=int(p90),
        p99=int(p99),
        longest=int(ordered[-1]),
        longest_share=float(ordered[-max(1, len(lengths) // 100) :].sum() / tokens),
        bins=_bins(lengths),
    )


def _bins(lengths: Integers) -> tuple[Bin, ...]:
    # Exact where a logarithm is not: frexp gives the bits of a whole number below 2^53.
    power = np.frexp(lengths.astype(np.float64))[1] - 1
    samples = np.bincount(power)
    tokens = np.bincount(power, weights=lengths)
    longest = int(lengths.max())
    return tuple(
        Bin(2**k, min(2 ** (k + 1) - 1, longest), int(samples[k]), int(tokens[k]))
        for k in range(int(power.min()), len(samples))
    )
