"""Let every rank say why it stops: torchrun ends all others as soon as the first one has exited.

Ranks come to the same error seconds apart, because their imports share a machine. So a rank that stops counts
itself in torchrun's own store, which outlives the ranks, and leaves when the others are counted, too.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store

from megatron.pretrain.health.rendezvous import agent_store

# How long a rank that stops waits: for ranks that are still starting, and for ranks at work, which notice
# that it is gone.
STARTING_S = 60.0
WORKING_S = 5.0

_POLL_S = 0.02


class ExitBarrier:
    """Counts the ranks of this start of the job that have checked their input, and those that have stopped.

    Does nothing without torchrun's store: a rank that was started by other means is not stopped by it.
    """

    def __init__(self) -> None:
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._checked = False
        self._store = _own_part() if self._world_size > 1 else None

    def checked(self) -> None:
        """Note that this rank's input is in order and that it goes on to work with the others."""
        self._checked = True
        self._count("arrived", 1)

    def leave(self) -> None:
        """Note that this rank stops, without waiting for others."""
        self._count("stopped", 1)

    def wait(self) -> None:
        """Return when no other rank is left that would stop for the same reason, or the bound is over.

        Before its checks are done a rank waits until all others have either passed theirs or stopped;
        afterwards until all have stopped.
        """
        self._count("stopped", 1)
        if self._checked:
            self._wait_for("stopped", WORKING_S)
        else:
            self._count("arrived", 1)
            self._wait_for("arrived", STARTING_S)

    def _wait_for(self, name: str, bound_s: float) -> None:
        end = time.monotonic() + bound_s
        while self._count(name, 0) < self._world_size and time.monotonic() < end:
            time.sleep(_POLL_S)

    def _count(self, name: str, by: int) -> int:
        if self._store is None:
            return self._world_size
        try:
            return self._store.add(name, by)
        except DistError:
            self._store = None  # torchrun itself has gone
            return self._world_size


def _own_part() -> Store | None:
    store = agent_store(timedelta(seconds=WORKING_S))
    # The counts of an earlier start of the same job must not be taken for this one's.
    prefix = f"farewell/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return None if store is None else PrefixStore(prefix, store)
