"""Notice losses that stand out from those before them."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW = 100
# Fewer losses say nothing about how much they usually scatter.
MIN_LOSSES = 20
MAX_DEVIATIONS = 8.0
# Below this share of the median nothing is called a spike, however quiet the losses were.
MIN_RISE = 0.05

# The median absolute deviation of a normal distribution is that many standard deviations.
_NORMAL = 0.6745


class LossSpikes:
    """A loss is a spike if it is above the median of the last ``WINDOW`` by more than both bounds.

    They are ``MAX_DEVIATIONS`` times the standard deviation, estimated from the median absolute deviation so
    that earlier spikes do not widen it, and ``MIN_RISE`` of the median.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def check(self, loss: float) -> str:
        """Add the next loss; a line about it if it is a spike, else an empty string."""
        text = ""
        if not math.isfinite(loss):
            return text
        if len(self._losses) >= MIN_LOSSES:
            usual = median(self._losses)
            deviation = median(abs(value - usual) for value in self._losses) / _NORMAL
            if loss - usual > max(MAX_DEVIATIONS * deviation, MIN_RISE * abs(usual)):
                text = (
                    f"lm loss {loss:.4f} is a spike: the last {len(self._losses)} have the median "
                    f"{usual:.4f} and a standard deviation of {deviation:.4f}"
                )
        self._losses.append(loss)
        return text
