"""Stop on request: SIGTERM or SIGUSR1 of a scheduler, Ctrl-C; on one rank or all, at different moments."""

from __future__ import annotations

import signal
from types import FrameType

from helixpipe.reliability.exit_codes import INTERRUPTED, PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Notes a signal instead of dying of it.

    A rank tells the others with the iteration's metrics, so that all of them stop after the same iteration.
    Further signals change nothing: the save that the first one has asked for goes on.

    Attributes:
        signal_name: the first signal that came; empty if none has.
    """

    def __init__(self) -> None:
        self.signal_name = ""

    @property
    def exit_code(self) -> int:
        """That the job is to end with, as far as this rank has been asked; 0 if it has not."""
        if not self.signal_name:
            return 0
        return INTERRUPTED if self.signal_name == signal.SIGINT.name else PREEMPTED

    def listen(self) -> None:
        """From here on; before, a signal ends the process as usual, as there is nothing to save."""
        for number in SIGNALS:
            # A shell lets jobs in the background ignore Ctrl-C.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
