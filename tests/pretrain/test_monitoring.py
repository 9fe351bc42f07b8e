"""Which errors are a rank's own, and which are those of a rank that has lost another."""

from __future__ import annotations

import argparse
import signal

import pytest
import torch.distributed as dist

from megatron.pretrain.health import monitoring
from megatron.pretrain.health.monitoring import PeerLost, monitored

ARGS = argparse.Namespace(
    rank=0, world_size=2, distributed_timeout_minutes=10, hang_timeout_s=None, failure_dir=None, save=None
)


class FakeMonitor:
    """Remembers what it is told."""

    def __init__(self, rank, world_size, *, deadlines, **options):
        self.said = []
        self.deadlines = deadlines

    def report_failure(self, error, *, say=False):
        self.said.append((error, say))

    def close(self):
        self.said.append("closed")


@pytest.fixture(autouse=True)
def without_sentinel(monkeypatch):
    monkeypatch.setattr(monitoring, "Monitor", FakeMonitor)
    monkeypatch.setattr(monitoring, "_VERDICT_S", 0.0)


def said_after(error, args=ARGS):
    """What the others are told, and what leaves :func:`monitored`."""
    with pytest.raises(BaseException) as caught, monitored(args, lambda: None) as monitor:  # noqa: PT011
        raise error
    return monitor.said, caught.value


def test_a_good_end():
    with monitored(ARGS, lambda: None) as monitor:
        pass
    assert monitor.said == ["closed"]


def test_an_error_for_the_user_is_told_in_its_own_words():
    error = ValueError("--lr is too high")
    assert said_after(error) == ([("--lr is too high", False)], error)


def test_an_unexpected_error_is_told_with_its_kind_and_first_line():
    error = ZeroDivisionError("by zero\nand more")
    assert said_after(error) == ([("ZeroDivisionError: by zero", True)], error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"),
        RuntimeError("Broken pipe"),
        dist.DistNetworkError("the store has gone"),
    ],
)
def test_the_loss_of_a_peer_is_no_error_of_this_rank(error):
    said, left = said_after(error)
    assert said == [("it lost its connection to another rank", False)]
    assert isinstance(left, PeerLost)


def test_a_request_to_stop_is_told_and_obeyed():
    said, left = said_after(SystemExit(143))
    assert said == [("it was told to stop", False)]
    assert left.code == 143


def test_a_single_rank_has_no_deadline_of_its_own_accord():
    alone = argparse.Namespace(**{**vars(ARGS), "world_size": 1})
    with monitored(alone, lambda: None) as monitor:
        assert monitor.deadlines.of("step") == float("inf")
    with monitored(ARGS, lambda: None) as monitor:
        assert monitor.deadlines.of("step") == 600.0


def test_sigterm_exits_once(monkeypatch):
    old = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            monitoring._terminate(signal.SIGTERM, None)
        assert stop.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, old)
