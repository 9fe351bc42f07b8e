"""Where ranks leave what they have found for rank 0, and rank 0 what it has decided; over a store."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from helixpipe.json_input import parse_json
from helixpipe.reliability.exit_codes import HANG, JobError

_POLL_S = 0.02
_DECIDING_S = 10.0
_PARTING_S = 3.0


class NoDecision(JobError):
    """Rank 0 does not answer."""

    exit_code = HANG


class Board:
    """One rank's view of it.

    Args:
        store: that all ranks reach.
        rank, world_size: of the job.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._store = store

    def post(self, name: str, value: Any) -> None:
        """Leave something; a later post of the same name takes its place."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))

    def read(self, name: str, rank: int) -> Any:
        """What a rank has left, None if nothing."""
        key = f"{name}/{rank}"
        return parse_json(self._store.get(key), key) if self._store.check([key]) else None

    def fail(self, name: str, reason: str) -> None:
        """Leave word that what is collected under this name will not come, and why."""
        self.post(f"{name}, error", reason)

    def collect(self, name: str, limit_s: float) -> tuple[dict[int, Any], dict[int, str]]:
        """What ranks have left, and, of those that have not in time, why: what they say, or nothing."""
        end = time.monotonic() + limit_s
        waited_for, failed = list(range(self.world_size)), dict[int, str]()
        while waited_for := [rank for rank in waited_for if not self._store.check([f"{name}/{rank}"])]:
            failed = {rank: self.read(f"{name}, error", rank) or "" for rank in waited_for}
            if all(failed.values()) or time.monotonic() > end:
                break
            time.sleep(_POLL_S)
        missing = {rank: failed[rank] for rank in waited_for}
        came = [rank for rank in range(self.world_size) if rank not in missing]
        return {rank: self.read(name, rank) for rank in came}, missing

    def decide(self, name: str, value: Any, limit_s: float) -> Any:
        """Rank 0's value, on every rank; the others' is not looked at.

        Raises:
            NoDecision: it does not come.
        """
        if self.rank == 0:
            self._store.set(name, json.dumps(value))
            return value
        # Rank 0 may first come to its own limit, and then wait for others.
        end = time.monotonic() + 2 * limit_s + _DECIDING_S
        while not self._store.check([name]):
            if time.monotonic() > end:
                raise NoDecision(f"rank {self.rank}: rank 0 does not say how it goes on ({name})")
            time.sleep(_POLL_S)
        return parse_json(self._store.get(name), name)

    def part(self) -> None:
        """Return when all ranks that are still there have read everything: the store may end with rank 0."""
        self.post("parted", True)
        if self.rank == 0:
            self.collect("parted", _PARTING_S)

    def set_timeout(self, limit_s: float) -> None:
        """How long the store itself may take to answer."""
        self._store.set_timeout(timedelta(seconds=limit_s))
