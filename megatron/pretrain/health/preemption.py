"""Stop on the scheduler's request: SIGTERM or SIGUSR1, on one rank or on all, at different moments."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Notes a signal instead of dying of it.

    A rank tells the others with the iteration's metrics, so that all of them stop after the same iteration.
    Further signals change nothing: the save that the first one has asked for goes on.

    Attributes:
        signal_name: the first signal that came; empty if none has.
    """

    def __init__(self) -> None:
        self.signal_name = ""

    def listen(self) -> None:
        """From here on; before, a signal ends the process as usual, as there is nothing to save."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
