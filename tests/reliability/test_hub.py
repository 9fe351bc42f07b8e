"""The hub alone, with sentinels that say what a test tells them to."""

from __future__ import annotations

import socket
import time

import pytest

from helixpipe.reliability.hub import Hub, status_message
from helixpipe.reliability.status import ENDED, Status
from helixpipe.reliability.wire import Connection

LATE = {"operation": "3F0", "seconds": 70.0, "deadline_s": 20.0}
BUSY = {"operation": "3F0", "seconds": 0.1, "deadline_s": 20.0}
WAITING = {"message": "3RECV_F0@1", "peer": 1, "seconds": 1.0, "deadline_s": 20.0}


class Sentinel:
    """One end of a connection to the hub."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self._rank = rank
        self._connection = Connection(socket.create_connection(("localhost", hub.port)))
        self._connection.send({"token": "secret", "rank": rank})

    def report(self, *, asked: bool = False, **status) -> None:
        self._connection.send(status_message(Status(self._rank, self._rank, "here", **status), asked=asked))

    def hears(self, word: str, within_s: float = 10.0) -> bool:
        end = time.monotonic() + within_s
        while time.monotonic() < end and self._connection.is_open:
            if any(word in message for message in self._connection.receive()):
                return True
        return False

    def leave(self) -> None:
        self.report(condition=ENDED)
        self._connection.close()


@pytest.fixture
def job():
    said: list[str] = []
    hub = Hub(2, "secret", said.append)
    hub.start()
    sentinels = [Sentinel(hub, rank) for rank in range(2)]
    yield said, sentinels
    for sentinel in sentinels:
        sentinel.leave()
    hub.join(10.0)
    assert not hub.is_alive()


def test_a_rank_that_is_late_at_two_looks_hangs(job):
    said, (first, second) = job
    first.report(**WAITING)
    second.report(**LATE)
    assert first.hears("report")
    assert said == []
    first.report(asked=True, **WAITING)
    second.report(asked=True, **LATE)
    assert second.hears("verdict")
    assert said[0].startswith("hang: rank 1 ")


def test_a_rank_that_has_gone_on_at_the_second_look_does_not_hang(job):
    said, (first, second) = job
    for _ in range(2):
        first.report(**WAITING)
        second.report(**LATE)
        # Asked each time anew.
        assert first.hears("report")
        first.report(asked=True, **WAITING)
        second.report(asked=True, **BUSY)
        # Until the hub has seen both.
        time.sleep(0.6)
    assert said == []
