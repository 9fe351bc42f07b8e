"""Real gloo ranks go through preflight: what is wrong is found, named, and ends all of them alike."""

from __future__ import annotations

import pytest
from preflight_worker import fly_all, hidden_by
from ranks import run_on_ranks

from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.preflight.flight import Demand
from helixpipe.reliability.exit_codes import BAD_DATA, BAD_HOST, BAD_USAGE, HANG, PEER_LOST
from helixpipe.runtime.connections import pairs_of

# Compute that hides 16 MiB at 50 GB/s, and not at 0.5.
COMPUTE_MS = 20.0
SEEN = {
    "slow link": (BAD_HOST, "links", "rank 1 on n0 to rank 2 on n1: 16 MiB take 33.6 ms at 0.5 GB/s"),
    "version": (BAD_USAGE, "versions", "version of torch is 2.0.0 on n1, 2.13"),
    "job": (BAD_DATA, "job", "n1: /data/corpus.idx: no such file"),
    "clock": (BAD_HOST, "clocks", "the clock of n1 is +7.0 s off"),
    # Leaves a thread behind: last.
    "stuck link": (HANG, "measuring", "rank 2 on n1, rank 3 on n1 did not come to the end of the link from"),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By case, what each of four ranks came to under 1F1B."""
    plan = build_plan("1f1b", ScheduleRequest(num_layers=4, num_ranks=4, num_microbatches=4))
    demand = Demand(4, frozenset(pairs_of(plan)), hidden_by(COMPUTE_MS, pairs_of(plan)))
    folder = tmp_path_factory.mktemp("stores")
    of_ranks = run_on_ranks(4, fly_all, str(folder), 4, demand, list(SEEN), backend=None)
    return dict(zip(SEEN, zip(*of_ranks, strict=True), strict=True))


@pytest.mark.parametrize("case", SEEN)
def test_what_is_wrong_is_named_and_ends_every_rank(outcomes, case):
    code, name, words = SEEN[case]
    assert [outcome.code for outcome in outcomes[case]] == [code] * 4
    first, *others = outcomes[case]
    failed = {check.name: check.verdict for check in first.checks if check.problem}
    assert list(failed) == [name]
    assert words in failed[name]
    assert not any(outcome.checks for outcome in others)


def test_nothing_is_measured_between_ranks_that_differ(outcomes):
    assert not outcomes["version"][0].links
    assert "process group" not in [check.name for check in outcomes["version"][0].checks]


@pytest.mark.parametrize(("world_size", "stages"), [(2, 2), (4, 2)])
def test_all_is_well(tmp_path, world_size, stages):
    """Links are measured both ways between the ranks of each pipeline; the second layout has two of them."""
    plan = build_plan("helix", ScheduleRequest(num_layers=2, num_ranks=stages, num_microbatches=4))
    demand = Demand(stages, frozenset(pairs_of(plan)), hidden_by(1e6, pairs_of(plan)))
    first, *others = (
        found
        for (found,) in run_on_ranks(
            world_size, fly_all, str(tmp_path), world_size, demand, ["fine"], backend=None
        )
    )
    assert [check.verdict for check in first.checks if check.problem] == []
    names = ["ranks", "versions", "GPUs", "GPU memory", "GPU speed", "local disk", "job", "process group"]
    assert [check.name for check in first.checks] == [*names, "measuring", "clocks", "links"]
    assert [outcome.code for outcome in (first, *others)] == [0] * world_size
    share = world_size // stages
    wanted = {(rank, rank + share) for rank in range(share)} | {(rank + share, rank) for rank in range(share)}
    assert set(first.links) == wanted
    assert all(link.gb_per_s > 0.001 and link.latency_ms > 0 for link in first.links.values())


def test_a_peer_that_never_came_is_named(tmp_path):
    of_ranks = run_on_ranks(1, fly_all, str(tmp_path), 2, Demand(), ["missing peer"], backend=None)
    ((outcome,),) = of_ranks
    assert outcome.code == PEER_LOST
    assert [check.verdict for check in outcome.checks] == [
        "ranks: FAILED: rank 1 on n1 did not come to the start within 1 s"
    ]
