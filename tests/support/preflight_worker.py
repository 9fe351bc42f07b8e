"""Ranks that go through preflight, four of them on two pretended hosts, with one thing wrong at a time."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from helixpipe.plan.simulation.link_needs import LinkNeed
from helixpipe.preflight.checks import Link
from helixpipe.preflight.facts import Facts, gather_facts
from helixpipe.preflight.flight import Demand, Flight, Outcome
from helixpipe.preflight.links import clock_readings

MIB = 1 << 20
SHORT_S = 1.0


def fly_all(folder: str, world_size: int, demand: Demand, cases: list[str]) -> list[Outcome]:
    """What one rank comes to in each case."""
    return [_fly(Path(folder) / case.replace(" ", "_"), world_size, demand, case) for case in cases]


def _fly(path: Path, world_size: int, demand: Demand, case: str) -> Outcome:
    rank = int(os.environ["RANK"])
    hosts = [f"n{number * 2 // world_size}" for number in range(world_size)]
    flight = Flight(
        dist.FileStore(str(path), world_size),
        rank,
        world_size,
        hosts=hosts,
        device=torch.device("cpu"),
        backend="gloo",
        # What comes in time has a minute: the machine may be busy.
        limit_s=SHORT_S if case in ("missing peer", "stuck link") else 60.0,
        measure={"slow link": _slow_link, "stuck link": _stuck_link, "clock": _fast_link}.get(case),
        read_clocks=_skewed if case == "clock" else clock_readings,
    )
    try:
        return flight.run(_facts(case, hosts[rank], rank), demand)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _facts(case: str, host: str, rank: int) -> Facts:
    facts = gather_facts(host, ranks=2)
    if case == "version" and rank == 3:
        return replace(facts, versions=facts.versions | {"version of torch": "2.0.0"})
    if case == "job" and host == "n1":
        return replace(facts, job_error="/data/corpus.idx: no such file", job_code=3)
    return facts


def _fast_link(sender: int, receiver: int, num_bytes: int, device: torch.device) -> Link | None:
    return Link(0.02, 50.0) if dist.get_rank() == sender else None


def _slow_link(sender: int, receiver: int, num_bytes: int, device: torch.device) -> Link | None:
    link = _fast_link(sender, receiver, num_bytes, device)
    return link and Link(link.latency_ms, 0.5 if (sender, receiver) == (1, 2) else link.gb_per_s)


def _stuck_link(sender: int, receiver: int, num_bytes: int, device: torch.device) -> Link | None:
    if (sender, receiver) == (2, 3):
        time.sleep(10 * SHORT_S)
    return _fast_link(sender, receiver, num_bytes, device)


def _skewed(device: torch.device) -> list[float]:
    ahead = 7.0 if dist.get_rank() == 3 else 0.0
    return [reading + ahead for reading in clock_readings(device)]


def hidden_by(compute_ms: float, pairs: set[tuple[int, int]]) -> dict[tuple[int, int], LinkNeed]:
    """Messages of 16 MiB in both directions of each pair, hidden by so much compute."""
    need = LinkNeed(16 * MIB, compute_ms)
    return {ends: need for first, second in pairs for ends in ((first, second), (second, first))}
