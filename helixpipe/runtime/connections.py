"""Connections between pipeline ranks, made before the first message of a plan.

NCCL connects two ranks at their first message, and the host waits there for the peer's first message. Within
an iteration that order is the plan's, not one in which connecting is safe.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext

import torch

from helixpipe.plan.plan import Plan
from helixpipe.reliability.exit_codes import HANG, JobError
from helixpipe.runtime.communicator import Communicator

Pair = tuple[int, int]

# Making one takes NCCL about a second; a rank may first have to serve others.
CONNECTION_TIMEOUT_S = 120.0


class NotConnected(JobError):
    """Two ranks that did not connect in time."""

    exit_code = HANG


class Connections:
    """The pairs of ranks that have exchanged a message, in each direction.

    Args:
        communicator: this rank's end.
        device: where messages are.
        timeout_s: how long this rank waits for one peer.
    """

    def __init__(
        self, communicator: Communicator, device: torch.device, timeout_s: float = CONNECTION_TIMEOUT_S
    ) -> None:
        self.communicator = communicator
        self.device = device
        self.timeout_s = timeout_s
        self._open: set[Pair] = set()

    def open_for(self, plan: Plan) -> None:
        """Connect every pair that ``plan`` uses; all ranks call it with the same plans in the same order.

        Raises:
            NotConnected: a peer did not answer in time; names the pair.
        """
        rank = self.communicator.rank
        wanted = pairs_of(plan) - self._open
        for pair in connection_order(wanted, plan.num_ranks):
            if rank in pair:
                self._exchange_in_time(pair)
        self._open |= wanted

    def _exchange_in_time(self, pair: Pair) -> None:
        failures: list[Exception] = []

        def exchange() -> None:
            try:
                self._exchange(pair)
            except Exception as error:
                failures.append(error)

        # On a thread that may be left behind: NCCL's own wait for a peer has no end that we could set.
        thread = threading.Thread(target=exchange, name=f"connect {pair[0]} and {pair[1]}", daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if thread.is_alive():
            (peer,) = set(pair) - {self.communicator.rank}
            raise NotConnected(
                f"pipeline ranks {pair[0]} and {pair[1]} did not connect within {self.timeout_s:g} s; "
                f"look for an earlier error of pipeline rank {peer}, else check the network between the two "
                "(NCCL_DEBUG=INFO shows it)"
            )
        if failures:
            raise failures[0]

    def _exchange(self, pair: Pair) -> None:
        """One message from the lower rank to the higher, then one back."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device:
            for sender, receiver in (pair, pair[::-1]):
                word = torch.full((1,), float(sender), device=self.device)
                if self.communicator.rank == sender:
                    self.communicator.send(word, receiver, 0).wait()
                else:
                    self.communicator.receive(word, sender, 0).wait()
            if self.device.type == "cuda":
                # What was waited for above is the stream, not the host.
                torch.cuda.current_stream(self.device).synchronize()


def pairs_of(plan: Plan) -> set[Pair]:
    """The pairs of ranks, lower first, between which a lowered plan has messages."""
    return {
        (min(rank, op.peer), max(rank, op.peer))
        for rank, order in enumerate(plan.orders)
        for op in order
        if op.peer is not None
    }


def connection_order(pairs: set[Pair], num_ranks: int) -> list[Pair]:
    """One order for all ranks, in which no two that follow each other closely share a rank.

    Pairs whose ranks have the same sum modulo ``num_ranks`` are disjoint and connect at the same time: it
    takes as long as ``num_ranks`` connections one after the other at most.
    """
    return sorted(pairs, key=lambda pair: (sum(pair) % num_ranks, pair))
