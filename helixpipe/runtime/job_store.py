"""The store in which the ranks of a job find each other, where no launcher has made one for them."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import DistError, Store, TCPStore

from helixpipe.reliability.exit_codes import PEER_LOST, JobError

DEFAULT_PORT = 29500

_POLL_S = 0.05
# How long ranks that have come are told who has not.
_TELLING_S = 3.0
_MAX_SHOWN = 8


class NotMet(JobError):
    """Ranks that have not found each other in time."""

    exit_code = PEER_LOST


class Place(NamedTuple):
    """Where rank 0 listens; shown as ``HOST:PORT``."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @classmethod
    def from_environment(cls, world_size: int) -> Place:
        """``MASTER_ADDR`` and ``MASTER_PORT``; alone, a rank takes any free port unless one is named.

        Raises:
            ValueError: a port that is none.
        """
        text = os.environ.get("MASTER_PORT", str(DEFAULT_PORT) if world_size > 1 else "0")
        # Port 0 means any, which nobody else could find.
        if not text.isdecimal() or int(text) > 65535 or (int(text) == 0 and world_size > 1):
            raise ValueError(f"MASTER_PORT {text!r} is not a port; set it to a number from 1 to 65535")
        return cls(os.environ.get("MASTER_ADDR", "localhost"), int(text))


def open_store(
    place: Place, rank: int, world_size: int, timeout: timedelta, names: Sequence[str] = ()
) -> Store:
    """A store on rank 0's host, once all ranks have come to it.

    Args:
        place: where rank 0 listens.
        rank, world_size: of the job.
        timeout: how long to wait for others.
        names: of the ranks' hosts, by rank, for messages; unknown if empty.

    Raises:
        ValueError: a host without an address, or a port that another program has.
        NotMet: nobody listens there, or a rank did not come; on every rank that can know it.
    """
    end = time.monotonic() + timeout.total_seconds()
    _resolve(place)
    store = _listen(place, timeout) if rank == 0 else _connect(place, timeout)
    store.set(f"came/{rank}", "")
    try:
        if rank == 0:
            _expect(store, place, world_size, end, timeout, names)
        else:
            _await_verdict(store, place, end)
    except DistError:
        raise NotMet(
            f"rank 0 at {place} has ended before all ranks had come; its own line says why"
        ) from None
    return store


def _resolve(place: Place) -> None:
    try:
        socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no valid name"
        raise ValueError(
            f"MASTER_ADDR {place.host} has no address ({why}); set it to the name or address of rank 0's host"
        ) from None


def _listen(place: Place, timeout: timedelta) -> TCPStore:
    try:
        with socket.socket(socket.AF_INET) as probe:
            # As the store's own listener: addresses of connections that have just ended are free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", place.port))
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        raise ValueError(_cannot_listen(place, error.strerror or str(error), is_taken=is_taken)) from None
    found = _construct(place, timeout, is_master=True)
    if isinstance(found, TCPStore):
        return found
    if "EADDRINUSE" in found:
        # Taken in the meantime.
        raise ValueError(_cannot_listen(place, os.strerror(errno.EADDRINUSE), is_taken=True))
    raise ValueError(
        f"rank 0 listens on port {place.port}, but does not answer at {place}; set MASTER_ADDR to a name or "
        "address of rank 0's own host"
    )


def _cannot_listen(place: Place, why: str, *, is_taken: bool) -> str:
    return (
        f"rank 0 cannot listen at {place} ({why}){': another program has the port' if is_taken else ''}; set "
        "MASTER_PORT to a free one, the same on all ranks"
    )


def _connect(place: Place, timeout: timedelta) -> TCPStore:
    end = time.monotonic() + timeout.total_seconds()
    while why := _refusal(place, end):
        if time.monotonic() > end:
            raise NotMet(
                f"nobody listens at {place} after {timeout.total_seconds():g} s ({why}); "
                "start rank 0 there, or correct MASTER_ADDR and MASTER_PORT"
            )
        time.sleep(_POLL_S)
    left = timedelta(seconds=max(1.0, end - time.monotonic()))
    found = _construct(place, left, is_master=False)
    if isinstance(found, TCPStore):
        return found
    raise NotMet(
        f"what listens at {place} is not rank 0 of this job; set MASTER_PORT to a port that no "
        "other program has, the same on all ranks"
    )


def _refusal(place: Place, end: float) -> str:
    """Why no connection comes about, empty if one does."""
    try:
        limit_s = min(5.0, max(0.5, end - time.monotonic()))
        with socket.create_connection(place, timeout=limit_s):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _construct(place: Place, timeout: timedelta, *, is_master: bool) -> TCPStore | str:
    """The store, or why there is none.

    The client waits for ever for the first answer of a program that is no store, whatever its timeout: on a
    thread of its own it holds up nobody.
    """
    found: list[TCPStore | str] = []

    def construct() -> None:
        try:
            found.append(TCPStore(*place, None, is_master, timeout, False, is_master))
        except Exception as error:
            found.append(str(error))

    thread = threading.Thread(target=construct, name="helixpipe-store", daemon=True)
    thread.start()
    thread.join(timeout.total_seconds() + 1)
    return found[0] if found else "no answer"


def _expect(
    store: Store, place: Place, world_size: int, end: float, timeout: timedelta, names: Sequence[str]
) -> None:
    """Rank 0 waits for all others, and tells those that have come who has not."""
    missing = list(range(1, world_size))
    while missing := [rank for rank in missing if not store.check([f"came/{rank}"])]:
        if time.monotonic() > end:
            break
        time.sleep(_POLL_S)
    message = ""
    if missing:
        within = f"did not come to {place} within {timeout.total_seconds():g} s"
        message = f"{describe_ranks(missing, names)} {within}; look for an error on that host"
    store.set("missing", message)
    if missing:
        told = world_size - len(missing) - 1
        end = time.monotonic() + _TELLING_S
        while store.add("told", 0) < told and time.monotonic() < end:
            time.sleep(_POLL_S)
        raise NotMet(message)


def describe_ranks(missing: Sequence[int], names: Sequence[str] = ()) -> str:
    """``rank 3 on HOST, rank 7 on HOST and 5 more``; without hosts if ``names`` is empty."""
    shown = [f"rank {rank}" + (f" on {names[rank]}" if names else "") for rank in missing[:_MAX_SHOWN]]
    more = f" and {len(missing) - _MAX_SHOWN} more" if len(missing) > _MAX_SHOWN else ""
    return ", ".join(shown) + more


def _await_verdict(store: Store, place: Place, end: float) -> None:
    while not store.check(["missing"]):
        if time.monotonic() > end + _TELLING_S:
            raise NotMet(f"rank 0 at {place} does not say whether all ranks have come")
        time.sleep(_POLL_S)
    message = store.get("missing").decode()
    if message:
        store.add("told", 1)
        raise NotMet(message)
