"""Which errors are a rank's own, and which are those of a rank that has lost another."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
import torch.distributed as dist
from job_settings import job_settings

from helixpipe.megatron_adapter import watching
from helixpipe.megatron_adapter.watching import PeerLost
from megatron.pretrain.health import monitoring
from megatron.pretrain.health.monitoring import monitored


class FakeMonitor:
    """Remembers what it is told."""

    def __init__(self, rank, world_size, *, deadlines, **options):
        self.said = []
        self.deadlines = deadlines

    def report_failure(self, error, *, say=False):
        self.said.append((error, say))

    def close(self):
        self.said.append("closed")


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    return job_settings()


@pytest.fixture(autouse=True)
def without_sentinel(monkeypatch):
    monkeypatch.setattr(monitoring, "Monitor", FakeMonitor)
    monkeypatch.setattr(watching, "_VERDICT_S", 0.0)


@pytest.fixture
def said_after(settings):
    """What the others are told, and what leaves :func:`monitored`."""

    def said_after(error):
        with pytest.raises(BaseException) as caught, monitored(settings, lambda: None) as monitor:  # noqa: PT011
            raise error
        return monitor.said, caught.value

    return said_after


def test_a_good_end(settings):
    with monitored(settings, lambda: None) as monitor:
        pass
    assert monitor.said == ["closed"]


def test_an_error_for_the_user_is_told_in_its_own_words(said_after):
    error = ValueError("--lr is too high")
    assert said_after(error) == ([("--lr is too high", False)], error)


def test_an_unexpected_error_is_told_with_its_kind_and_first_line(said_after):
    error = ZeroDivisionError("by zero\nand more")
    assert said_after(error) == ([("ZeroDivisionError: by zero", True)], error)


@pytest.mark.parametrize("code", [0, None])
def test_a_program_may_end_by_itself(said_after, code):
    said, left = said_after(SystemExit(code))
    assert said == ["closed"]
    assert left.code == code


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"),
        RuntimeError("Broken pipe"),
        dist.DistNetworkError("the store has gone"),
    ],
)
def test_the_loss_of_a_peer_is_no_error_of_this_rank(said_after, error):
    said, left = said_after(error)
    assert said == [("it lost its connection to another rank", False)]
    assert isinstance(left, PeerLost)


def test_a_request_to_stop_is_told_and_obeyed(said_after):
    said, left = said_after(SystemExit(143))
    assert said == [("it was told to stop", False)]
    assert left.code == 143


def test_a_single_rank_has_no_deadline_of_its_own_accord(settings):
    alone = replace(settings, parallel=replace(settings.parallel, world_size=1))
    with monitored(alone, lambda: None) as monitor:
        assert monitor.deadlines.of("step") == float("inf")
    with monitored(settings, lambda: None) as monitor:
        assert monitor.deadlines.of("step") == 600.0


def test_sigterm_exits_once(monkeypatch):
    old = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            watching._terminate(signal.SIGTERM, None)
        assert stop.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, old)
