"""End a job where it was told to: after so many iterations or minutes."""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron.pretrain.settings.ending import Ending

_STARTED = time.monotonic()  # this module is imported when the program starts


class PlannedEnd:
    """Knows when to end.

    Args:
        ending: what was asked for.
        clock: seconds.
        started: when the program has.
    """

    def __init__(
        self, ending: Ending, clock: Callable[[], float] = time.monotonic, started: float = _STARTED
    ) -> None:
        self._ending = ending
        self._clock = clock
        self._started = started

    @property
    def is_over(self) -> bool:
        """Whether this rank's time is up; clocks differ, so ranks tell each other."""
        minutes = self._ending.minutes
        return minutes is not None and self._clock() - self._started >= 60 * minutes

    def reason(self, iteration: int, *, is_over: bool) -> str:
        """Why to end after an iteration, as an option; empty to go on.

        Args:
            iteration: that has finished.
            is_over: whether time is up on any rank.
        """
        interval, minutes = self._ending.interval, self._ending.minutes
        if is_over:
            return f"--exit-duration-in-mins {minutes:g}"
        if interval is not None and iteration % interval == 0:
            return f"--exit-interval {interval}"
        return ""
