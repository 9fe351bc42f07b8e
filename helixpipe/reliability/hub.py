"""The hub: hears every rank's sentinel, and decides when the job is over and who is to blame."""

from __future__ import annotations

import dataclasses
import selectors
import socket
import threading
import time
from collections.abc import Callable

from helixpipe.reliability.diagnosis import (
    culprits,
    describe_failed,
    describe_hang,
    describe_lost,
    last_completed,
)
from helixpipe.reliability.exit_codes import HANG, PEER_LOST
from helixpipe.reliability.status import DEAD, ENDED, FAILED, Status
from helixpipe.reliability.wire import Connection, Message

TICK_S = 0.2
BEAT_S = 1.0
# A sentinel that is silent for longer has lost its host or its network.
SILENCE_S = 15.0
# Deaths and errors come in groups: a host takes all its ranks with it, and wrong input is found by all.
DEATH_GRACE_S = 0.3
ERROR_GRACE_S = 1.5
# How long the verdict waits for a last look at every rank; regular reports are older than a step.
LOOK_S = 1.0
# A loop that took longer was itself stopped: a job that was suspended and goes on is not overdue.
PAUSE_S = 3.0


class Hub(threading.Thread):
    """Runs beside the sentinel of rank 0.

    Args:
        world_size: ranks to expect.
        token: what a sentinel must show to be heard.
        say: prints the line that names the culprits.

    Attributes:
        port: where sentinels connect.
    """

    def __init__(self, world_size: int, token: str, say: Callable[[str], None]) -> None:
        super().__init__(daemon=True)
        self._world_size = world_size
        self._token = token
        self._say = say
        self._server = _listen()
        self.port: int = self._server.getsockname()[1]
        self._ranks: dict[Connection, int | None] = {}
        self._statuses: dict[int, Status] = {}
        self._heard: dict[int, float] = {}
        self._cut_off: set[int] = set()
        self._first_trouble: float | None = None
        self._asked_at: float | None = None
        self._looked: set[int] = set()
        self._verdict: Message | None = None

    def run(self) -> None:
        """Listen until every sentinel has gone."""
        selector = selectors.DefaultSelector()
        selector.register(self._server, selectors.EVENT_READ)
        last_tick = next_beat = time.monotonic()
        while not self._is_over():
            for key, _ in selector.select(TICK_S):
                if key.fileobj is self._server:
                    connection = Connection(self._server.accept()[0])
                    self._ranks[connection] = None
                    selector.register(connection, selectors.EVENT_READ)
                else:
                    assert isinstance(key.fileobj, Connection)
                    self._hear(key.fileobj)
            now = time.monotonic()
            if now - last_tick > PAUSE_S:
                self._heard = dict.fromkeys(self._heard, now)
            last_tick = now
            if now >= next_beat:
                self._tell({"beat": True})
                next_beat = now + BEAT_S
            if self._verdict is None:
                self._judge(now)
            for connection in [each for each in self._ranks if not each.is_open]:
                selector.unregister(connection)
                self._forget(connection)

    def _hear(self, connection: Connection) -> None:
        for message in connection.receive():
            if self._ranks[connection] is None:
                if message.get("token") != self._token:
                    connection.is_open = False
                    return
                self._ranks[connection] = int(message["rank"])
                connection.send({"beat": True})
            if "status" in message:
                status = Status.from_message(message["status"])
                self._statuses[status.rank] = status
                self._heard[status.rank] = time.monotonic()
                if message.get("asked"):
                    self._looked.add(status.rank)

    def _forget(self, connection: Connection) -> None:
        rank = self._ranks.pop(connection)
        connection.close()
        if rank in self._statuses and self._statuses[rank].condition not in (ENDED, FAILED):
            self._cut_off.add(rank)

    def _tell(self, message: Message) -> None:
        for connection, rank in self._ranks.items():
            if rank is not None:
                connection.send(message)

    def _is_over(self) -> bool:
        has_settled = self._verdict is not None or not self._missing()
        return has_settled and not self._ranks

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._world_size) if rank not in self._statuses]

    def _judge(self, now: float) -> None:
        statuses = self._statuses
        lost = sorted(
            rank
            for rank, status in statuses.items()
            if status.condition == DEAD
            or rank in self._cut_off
            or (status.condition not in (ENDED, FAILED) and now - self._heard[rank] > SILENCE_S)
        )
        failed = sorted(rank for rank, status in statuses.items() if status.condition == FAILED)
        if lost or failed:
            if self._first_trouble is None:
                self._first_trouble = now
            # An error is said before a death that it may have caused.
            if now - self._first_trouble < (ERROR_GRACE_S if failed else DEATH_GRACE_S):
                return
            if not self._has_looked(now):
                return
            if failed:
                self._end("failed", PEER_LOST, failed, describe_failed(statuses, failed))
            else:
                self._end("lost", PEER_LOST, lost, describe_lost(statuses, lost))
        elif any(status.is_overdue for status in statuses.values()):
            if self._has_looked(now):
                missing = self._missing()
                self._end("hang", HANG, culprits(statuses, missing), describe_hang(statuses, missing))
        else:
            self._asked_at = None
            self._looked.clear()

    def _has_looked(self, now: float) -> bool:
        """True once every sentinel has said how its rank is after all this, asked the first time."""
        if self._asked_at is None:
            self._asked_at = now
            self._tell({"report": True})
        present = {rank for rank in self._ranks.values() if rank is not None}
        return present <= self._looked or now - self._asked_at > LOOK_S

    def _end(self, kind: str, code: int, guilty: list[int], reason: str) -> None:
        # In the names of what all ranks leave after it.
        now = time.strftime("%Y-%m-%dT%H%M%S")
        self._verdict = {"kind": kind, "code": code, "culprits": guilty, "reason": reason, "time": now}
        if kind != "failed":
            # Whoever has failed says so.
            self._say(f"{reason}; {last_completed(self._statuses)}")
        self._tell({"verdict": self._verdict})


def status_message(status: Status, *, asked: bool) -> Message:
    """What a sentinel sends, of its own accord or because the hub has ``asked``."""
    return {"status": dataclasses.asdict(status), "asked": asked}


def _listen() -> socket.socket:
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    except (OSError, ValueError):
        return socket.create_server(("", 0), backlog=1024)
