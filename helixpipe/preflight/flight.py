"""Leads the ranks of a job through the checks: facts, process group, clocks, links."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store

from helixpipe.plan.simulation.link_needs import LinkNeed
from helixpipe.preflight.board import Board
from helixpipe.preflight.checks import (
    Check,
    Link,
    Pair,
    check_arrival,
    check_clocks,
    check_facts,
    check_links,
)
from helixpipe.preflight.facts import Facts
from helixpipe.preflight.links import Measure, clock_readings, measure_links
from helixpipe.reliability.exit_codes import HANG, PEER_LOST
from helixpipe.runtime.job_store import describe_ranks


@dataclass(frozen=True)
class Demand:
    """What a job asks of the links between its ranks.

    Attributes:
        num_stages: pipeline-parallel size.
        pairs: of stages that exchange messages, lower first.
        needs: by sending and receiving stage, with the bytes of one GPU; empty if they are not known.
    """

    num_stages: int = 1
    pairs: frozenset[Pair] = frozenset()
    needs: Mapping[Pair, LinkNeed] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What preflight has come to.

    Attributes:
        code: exit code, the same on every rank.
        checks: in the order in which they were made; on rank 0 only, as what follows.
        facts: by rank.
        skews_s: each rank's clock less rank 0's.
        links: by sender and receiver.
    """

    code: int
    checks: Sequence[Check] = ()
    facts: Sequence[Facts] = ()
    skews_s: Sequence[float] = ()
    links: Mapping[Pair, Link] = field(default_factory=dict)


class Flight:
    """One rank's way through the checks; each stage starts only if the one before was in order everywhere.

    Args:
        store: in which all ranks have met.
        rank, world_size: of the job.
        hosts: of the ranks, by rank; for ranks that never tell theirs.
        device: of this rank.
        backend: ``nccl`` or ``gloo``.
        limit_s: for each stage.
        measure: stands in for the measurement of a link, in tests.
        read_clocks: stands in for the clock.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        hosts: Sequence[str],
        device: torch.device,
        backend: str,
        limit_s: float,
        measure: Measure | None = None,
        read_clocks: Callable[[torch.device], list[float]] = clock_readings,
    ) -> None:
        self._store, self._hosts, self._limit_s = store, hosts, limit_s
        self._device, self._backend = device, backend
        self._measure, self._read_clocks = measure, read_clocks
        self._board = Board(store, rank, world_size)
        self._board.set_timeout(limit_s)
        self._rank = rank
        self._facts: list[Facts] = []
        self._checks: list[Check] = []

    def run(self, facts: Facts, demand: Demand) -> Outcome:
        """Make all checks.

        Args:
            facts: of this rank.
            demand: the same on all ranks.

        Raises:
            NoDecision: rank 0 does not answer.
        """
        skews_s: list[float] = []
        links: dict[Pair, Link] = {}
        if self._tell(facts) and self._start_group():
            readings = self._measure_all(demand)
            skews_s, links = self._judge(readings, demand)
        wrong = next((check.code for check in self._checks if check.problem), 0)
        code = int(self._board.decide("code", wrong, self._limit_s))
        self._board.part()
        if dist.is_initialized() and code == 0:
            # After a fault a group is not taken down: its other ranks may be gone.
            dist.destroy_process_group()
        return Outcome(code, self._checks, self._facts, skews_s, links)

    def _tell(self, facts: Facts) -> bool:
        self._board.post("facts", asdict(facts))
        if self._rank == 0:
            found, missing = self._board.collect("facts", self._limit_s)
            self._expect("ranks", PEER_LOST, f"{len(found)} have come", missing, "the start")
            if not missing:
                self._facts = [Facts(**found[rank]) for rank in sorted(found)]
                self._checks += check_facts(self._facts)
        return self._all_is_well("facts")

    def _start_group(self) -> bool:
        def start() -> None:
            dist.init_process_group(
                self._backend,
                store=dist.PrefixStore("group", self._store),
                rank=self._rank,
                world_size=self._board.world_size,
                timeout=timedelta(seconds=self._limit_s),
            )
            clock_readings(self._device)  # the first collective connects

        self._post_in_time("group", start)
        if self._rank == 0:
            found, missing = self._board.collect("group", self._limit_s)
            detail = f"{self._backend}, in {max(found.values(), default=0):.1f} s"
            self._expect("process group", HANG, detail, missing, f"the {self._backend} group")
        return self._all_is_well("group")

    def _measure_all(self, demand: Demand) -> dict[int, Any]:
        """Read the clock and measure this rank's links; on rank 0, what all ranks have found."""
        sizes = {pair: need.num_bytes for pair, need in demand.needs.items()}

        def measure() -> None:
            clocks = self._read_clocks(self._device)
            links = measure_links(
                demand.pairs, sizes, demand.num_stages, self._device, self._say, self._measure
            )  # fmt: skip
            self._board.post("readings", [clocks, [[*pair, *link] for pair, link in links.items()]])

        self._post_in_time("measured", measure)
        if self._rank != 0:
            return {}
        _, missing = self._board.collect("measured", self._limit_s)
        places = {rank: at for rank in missing if (at := self._board.read("at", rank))}
        # The others wait for them.
        stuck = {rank: missing[rank] for rank in places or missing}
        where = ", ".join(dict.fromkeys(places.values())) or "the clocks"
        self._expect("measuring", HANG, "done", stuck, f"the end of {where}")
        return {} if missing else self._board.collect("readings", self._limit_s)[0]

    def _judge(self, readings: Mapping[int, Any], demand: Demand) -> tuple[list[float], dict[Pair, Link]]:
        if not readings:
            return [], {}
        ours = readings[0][0]
        skews_s = [
            median(theirs - own for theirs, own in zip(readings[rank][0], ours, strict=True))
            for rank in sorted(readings)
        ]
        links = {(row[0], row[1]): Link(row[2], row[3]) for rank in readings for row in readings[rank][1]}
        self._checks.append(check_clocks(self._facts, skews_s))
        self._checks.append(check_links(self._facts, links, demand.needs, demand.num_stages))
        return skews_s, links

    def _say(self, where: str) -> None:
        self._board.post("at", where)

    def _post_in_time(self, name: str, function: Callable[[], None]) -> None:
        """Post how long it took, or why it did not come to its end."""
        started = time.monotonic()
        error = _in_time(function, self._limit_s, self._device)
        if error:
            self._board.fail(name, error)
        else:
            self._board.post(name, time.monotonic() - started)

    def _expect(self, name: str, code: int, detail: str, missing: Mapping[int, str], place: str) -> None:
        where = f"{place} within {self._limit_s:g} s"
        # A rank that could not reach another says so as well; the first is as good as any.
        reason = next((f"rank {rank}: {why}" for rank, why in missing.items() if why), "")
        ranks = describe_ranks(list(missing), self._hosts)
        self._checks.append(check_arrival(name, code, detail, ranks, where, reason))

    def _all_is_well(self, name: str) -> bool:
        return bool(self._board.decide(name, not any(c.problem for c in self._checks), self._limit_s))


def _in_time(function: Callable[[], None], limit_s: float, device: torch.device) -> str:
    """Call it on a thread, left behind if it takes too long; why it did not end well, empty if it did."""
    failures: list[str] = []

    def call() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            function()
        except Exception as error:
            failures.append(str(error).partition("\n")[0] or type(error).__name__)

    thread = threading.Thread(target=call, name="helixpipe-preflight", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        return f"no end after {limit_s:g} s"
    return failures[0] if failures else ""
