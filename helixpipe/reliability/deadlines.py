"""How long anything may take before it is called a hang: learned from how long the phase takes."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque

# Of the median duration of a phase.
FACTOR = 3.0
# Steps are even; storage is shared with others and may stall.
FLOOR_S = 5.0
OTHER_FLOOR_S = 60.0
STEADY_PHASES = ("step", "evaluate")
_SAMPLES = 32


class Deadlines:
    """Limits for a single operation or wait, by phase.

    Args:
        first_s: in a phase that has not been seen before, like the first step, which compiles and connects.
        fixed_s: instead of learning; 0 for no limit at all.
    """

    def __init__(self, first_s: float, fixed_s: float | None = None) -> None:
        self._first_s = first_s
        self._fixed_s = fixed_s
        self._samples: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_SAMPLES))

    def learn(self, phase: str, seconds: float) -> None:
        """A phase has taken this long."""
        self._samples[phase].append(seconds)

    def of(self, phase: str) -> float:
        """The limit in seconds; infinite for none."""
        if self._fixed_s is not None:
            return self._fixed_s or math.inf
        samples = self._samples[phase]
        if not samples:
            return self._first_s
        floor = FLOOR_S if phase in STEADY_PHASES else OTHER_FLOOR_S
        return max(floor, FACTOR * statistics.median(samples))
