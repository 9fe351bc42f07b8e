"""Connections: every pair of a plan, in one order on all ranks, and a peer that does not answer is named."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_group_worker import connect_unless_absent
from ranks import run_on_ranks
from threads import run_on_threads

from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.reliability.exit_codes import HANG, exit_code_of
from helixpipe.runtime.communicator import InMemoryFabric
from helixpipe.runtime.connections import Connections, NotConnected, connection_order, pairs_of

CPU = torch.device("cpu")


def helix(p):
    return build_plan("helix", ScheduleRequest(num_layers=p, num_ranks=p, num_microbatches=2 * p))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 17), st.data())
def test_ranks_that_meet_in_the_common_order_never_wait_for_each_other_in_a_circle(p, data):
    """Each rank stands at its first open pair and meets only a peer that stands there, too."""
    pairs = data.draw(st.sets(st.tuples(st.integers(0, p - 1), st.integers(0, p - 1))))
    pairs = {(min(pair), max(pair)) for pair in pairs if len(set(pair)) == 2}
    order = connection_order(pairs, p)
    assert sorted(order) == sorted(pairs)
    left = {rank: [pair for pair in order if rank in pair] for rank in range(p)}
    rounds = 0
    while any(left.values()):
        meeting = [a for a in range(p) if left[a] and all(left[b][0] == left[a][0] for b in left[a][0])]
        assert meeting
        for rank in meeting:
            del left[rank][0]
        rounds += 1
    assert rounds <= p


class Counting:
    """Counts the messages to each peer."""

    def __init__(self, inner):
        self.inner, self.rank, self.size = inner, inner.rank, inner.size
        self.sent = []

    def send(self, buffer, peer, tag):
        self.sent.append(peer)
        return self.inner.send(buffer, peer, tag)

    def receive(self, buffer, peer, tag):
        return self.inner.receive(buffer, peer, tag)


def test_every_pair_exchanges_one_message_each_way_and_only_once():
    plan = helix(4)
    assert len(pairs_of(plan)) == 6
    fabric = InMemoryFabric(4, timeout_s=5)
    ends = [Counting(fabric.communicator(rank)) for rank in range(4)]

    def connect(rank):
        connections = Connections(ends[rank], CPU)
        connections.open_for(plan.forward_only())
        connections.open_for(plan)

    run_on_threads(4, connect)
    fabric.assert_empty()
    assert [sorted(end.sent) for end in ends] == [[r for r in range(4) if r != rank] for rank in range(4)]


class Silent:
    """A transport whose host waits in the first message, as NCCL's does, until the test ends."""

    rank, size = 1, 4

    def __init__(self, answers):
        self.answers, self.release = answers, threading.Event()

    def send(self, buffer, peer, tag):
        if peer not in self.answers:
            self.release.wait(30)
        return self

    def receive(self, buffer, peer, tag):
        return self.send(buffer, peer, tag)

    def wait(self):
        pass


def test_a_peer_that_never_connects_is_named_within_the_limit():
    silent = Silent(answers={0, 2})
    try:
        with pytest.raises(
            NotConnected, match=r"pipeline ranks 1 and 3 did not connect within 0.05 s"
        ) as info:
            Connections(silent, CPU, timeout_s=0.05).open_for(helix(4))
    finally:
        silent.release.set()
    assert "\n" not in str(info.value)
    assert "error of pipeline rank 3" in str(info.value)
    assert exit_code_of(info.value) == HANG


def test_an_error_of_the_transport_is_passed_on():
    class Broken(Silent):
        def send(self, buffer, peer, tag):
            raise RuntimeError("connection reset")

    with pytest.raises(RuntimeError, match="connection reset"):
        Connections(Broken(()), CPU, timeout_s=5).open_for(helix(4))


def test_over_gloo_an_absent_rank_is_named():
    found = run_on_ranks(4, connect_unless_absent, 2, 1.0)
    assert found[2] is None
    for rank in (0, 1, 3):
        assert "did not connect within 1 s" in found[rank], found
    # At least one of them waits for the absent one; the others may wait for a rank that does.
    assert any("error of pipeline rank 2" in text for text in found if text)
