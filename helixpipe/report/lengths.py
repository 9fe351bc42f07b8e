"""The lengths of a dataset in the terminal: numbers and a histogram."""

from __future__ import annotations

from collections.abc import Iterable

from helixpipe.data.samples import DocumentSamples
from helixpipe.data.statistics import LengthStatistics

_BAR = 32
_PARTS = " ▏▎▍▌▋▊▉█"


def lengths_text(
    name: str, samples: DocumentSamples, statistics: LengthStatistics, max_seq_length: int | None
) -> str:
    """Statistics, what was cut off and left out, and one row per power of two.

    Args:
        name: of the dataset.
        samples: that ``statistics`` are of.
        statistics: see there.
        max_seq_length: at which samples were cut off; None if none were.
    """
    lines = [f"{name}: {statistics.samples:,} samples, {statistics.tokens:,} tokens to train on"]
    lines += (f"  {line}" for line in _numbers(samples, statistics, max_seq_length))
    return "\n".join([*lines, "", *_histogram(statistics)])


def _numbers(
    samples: DocumentSamples, statistics: LengthStatistics, max_seq_length: int | None
) -> Iterable[str]:
    yield (
        f"tokens per sample: median {statistics.median:,}, mean {statistics.mean:,.0f}, "
        f"90% up to {statistics.p90:,}, 99% up to {statistics.p99:,}, longest {statistics.longest:,}"
    )
    yield f"the longest 1% of the samples hold {statistics.longest_share:.1%} of the tokens"
    if max_seq_length is not None:
        lost = samples.lost_tokens / (statistics.tokens + samples.lost_tokens)
        yield (
            f"cut off after {max_seq_length:,} tokens: {samples.truncated:,} samples, "
            f"{samples.lost_tokens:,} tokens lost ({lost:.1%})"
        )
    if samples.too_short:
        yield f"left out: {samples.too_short:,} documents of fewer than 2 ids, with nothing to predict"
    if samples.without_loss:
        yield f"left out: {samples.without_loss:,} documents whose prompt leaves no token of the response"


def _histogram(statistics: LengthStatistics) -> Iterable[str]:
    labels = [f"{entry.first:,} - {entry.last:,}" for entry in statistics.bins]
    width = max(len(label) for label in [*labels, "tokens"])
    most_samples = max(entry.samples for entry in statistics.bins)
    most_tokens = max(entry.tokens for entry in statistics.bins)
    yield f"{'tokens':>{width}}   {'samples':>11}  {'':{_BAR}}  share of all tokens"
    for label, entry in zip(labels, statistics.bins, strict=True):
        share = entry.tokens / statistics.tokens
        row = (
            f"{label:>{width}}   {entry.samples:>11,}  {_bar(entry.samples / most_samples):{_BAR}}  "
            f"{share:>6.1%}  {_bar(entry.tokens / most_tokens)}"
        )
        yield row.rstrip()


def _bar(share: float) -> str:
    """A bar of up to ``_BAR`` characters in eighths; what is not nothing shows."""
    eighths = round(share * _BAR * 8)
    if share > 0:
        eighths = max(1, eighths)
    return "█" * (eighths // 8) + _PARTS[eighths % 8].strip()
