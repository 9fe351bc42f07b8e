"""Ranks that cannot find each other say why, with the address, each one that can know it."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from datetime import timedelta

import pytest

from helixpipe.reliability.exit_codes import BAD_USAGE, PEER_LOST, exit_code_of
from helixpipe.runtime import job_store
from helixpipe.runtime.job_store import NotMet, Place, open_store

SHORT = timedelta(seconds=1)
LONG = timedelta(seconds=20)


@pytest.fixture
def place():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Place("127.0.0.1", probe.getsockname()[1])


@pytest.fixture
def foreign():
    """Where a program listens that accepts connections and never says a word."""
    with socket.create_server(("", 0)) as server:
        yield Place("127.0.0.1", server.getsockname()[1])


def meet(place, ranks, world_size, timeout, names=()):
    """What each of these ranks comes to: a store or an error."""
    found = {}

    def come(rank):
        try:
            found[rank] = open_store(place, rank, world_size, timeout, names)
        except ValueError as error:
            found[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_all_come(place):
    stores = meet(place, range(3), 3, LONG)
    stores[2].set("key", "value")
    assert stores[0].get("key") == stores[1].get("key") == b"value"


def test_rank_0_may_come_last(place):
    found = {}
    late = threading.Thread(target=lambda: found.update(meet(place, [0], 2, LONG)))
    timer = threading.Timer(0.5, late.start)
    timer.start()
    found |= meet(place, [1], 2, LONG)
    late.join(30)
    found[0].set("key", "value")
    assert found[1].get("key") == b"value"


def test_the_port_is_taken(foreign):
    with pytest.raises(
        ValueError, match=f"cannot listen at {foreign}.*another program.*MASTER_PORT"
    ) as caught:
        open_store(foreign, 0, 1, LONG)
    assert exit_code_of(caught.value) == BAD_USAGE


def test_the_port_is_taken_at_the_last_moment(place, monkeypatch):
    """Between the look and the store's own listener, which words it in its own way."""
    monkeypatch.setattr(job_store, "_construct", lambda *_, **__: "failed to listen (EADDRINUSE: address)")
    with pytest.raises(ValueError, match=rf"at {place} \(Address already in use\): another program"):
        open_store(place, 0, 1, LONG)


def test_a_port_that_may_not_be_used_is_not_said_to_be_anothers(place, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(ValueError, match=rf"cannot listen at {place} \(Permission denied\); set MASTER_PORT"):
        open_store(place, 0, 1, LONG)


def test_another_program_answers_in_place_of_rank_0(foreign):
    started = time.monotonic()
    with pytest.raises(NotMet, match=f"what listens at {foreign} is not rank 0.*MASTER_PORT"):
        open_store(foreign, 1, 2, SHORT)
    assert time.monotonic() - started < 20, "torch's own client waits for ever"


def test_nobody_listens(place):
    with pytest.raises(
        NotMet, match=f"nobody listens at {place} after 1 s .*refused.*start rank 0"
    ) as caught:
        open_store(place, 1, 2, SHORT)
    assert exit_code_of(caught.value) == PEER_LOST


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("host", ["nosuch.invalid", "no host", "a..b", "x" * 80])
def test_an_address_that_does_not_exist(host, rank):
    with pytest.raises(ValueError, match=f"MASTER_ADDR {host} has no address") as caught:
        open_store(Place(host, 29500), rank, 2, LONG)
    assert exit_code_of(caught.value) == BAD_USAGE


def test_a_peer_that_never_comes_is_named_on_all_that_have_come(place):
    names = ["n0", "n0", "n1", "n1"]
    found = meet(place, [0, 1], 4, SHORT, names)
    for rank in (0, 1):
        assert isinstance(found[rank], NotMet)
        assert f"rank 2 on n1, rank 3 on n1 did not come to {place} within 1 s" in str(found[rank])


def test_many_missing_ranks_are_one_line(place):
    message = str(meet(place, [0], 1000, SHORT)[0])
    assert "rank 8 and 991 more did not come" in message
    assert "rank 9" not in message


@pytest.mark.parametrize("port", ["", "abc", "-1", "65536", "0", "12.5", "²"])
def test_a_port_that_is_none(monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ValueError, match=r"MASTER_PORT .* is not a port"):
        Place.from_environment(2)


def test_a_single_rank_needs_no_port(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    alone = Place.from_environment(1)
    first, second = open_store(alone, 0, 1, LONG), open_store(alone, 0, 1, LONG)
    first.set("key", "value")
    assert not second.check(["key"])
