"""Ranks that find each other again after torchrun has restarted them.

torchrun gives its ranks a store of its own that outlives them, and it is the same store after a restart:
there gloo and NCCL find the addresses of processes that are gone. A restart count in the keys would not help,
because each node's agent counts its own. So the ranks agree on a fresh name before they use the store.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from helixpipe.runtime.job_store import NotMet, Place, describe_ranks

_NAME = "start/name"
_JOB = "job/name"
_POLL_S = 0.05


def agent_store(timeout: timedelta) -> Store | None:
    """torchrun's own store, or None if the ranks were started by other means or torchrun has gone."""
    if not _has_agent_store():
        return None
    try:
        return TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout
        )
    except DistError:
        return None


def _has_agent_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def fresh_store(rank: int, world_size: int, timeout: timedelta) -> Store | None:
    """A part of torchrun's store that no earlier start of this job has touched, the same on every rank.

    None if the ranks were started by other means: then they have to make a store of their own.

    Raises:
        NotMet: torchrun's store does not answer, or other ranks did not come in time.
    """
    if not _has_agent_store():
        return None
    store = agent_store(timeout)
    if store is None:
        raise NotMet(
            f"torchrun's store at {Place.from_environment(world_size)} does not answer; start torchrun again"
        )
    find = _invite if rank == 0 else _join
    name = find(store, rank, world_size, time.monotonic() + timeout.total_seconds())
    return PrefixStore(name, store)


def _invite(store: Store, rank: int, world_size: int, end: float) -> str:
    """Rank 0 makes up the name and confirms it once everyone has come."""
    name = f"start/{uuid.uuid4().hex}"
    store.set(_NAME, name)
    missing = list(range(1, world_size))
    while missing := [other for other in missing if not store.check([f"{name}/{other}"])]:
        _pause(end, f"{describe_ranks(missing)} did not come")
    store.set(f"{name}/confirmed", "")
    return name


def _join(store: Store, rank: int, world_size: int, end: float) -> str:
    """Come to the name that stands in the store; it may be of an earlier start, whose rank 0 is gone.

    Then either this rank has come to it before, or nobody is left to confirm it.
    """
    refused = ""
    while True:
        name = store.get(_NAME).decode() if store.check([_NAME]) else ""
        if name and name != refused:
            if store.add(f"{name}/{rank}", 1) == 1:
                while store.get(_NAME).decode() == name:
                    if store.check([f"{name}/confirmed"]):
                        return name
                    _pause(end, "rank 0 did not confirm")
            else:
                refused = name
        _pause(end, "rank 0 did not come")


def _pause(end: float, problem: str) -> None:
    if time.monotonic() > end:
        raise NotMet(f"the ranks did not find each other in torchrun's store: {problem}")
    time.sleep(_POLL_S)


def job_identity(store: Store | None) -> str:
    """The name of this job, known to it alone: the same before and after torchrun has restarted its ranks.

    Args:
        store: torchrun's own; None if the ranks were started by other means, and never are again.
    """
    name = uuid.uuid4().hex
    return name if store is None else store.compare_set(_JOB, "", name).decode()
