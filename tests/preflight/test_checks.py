"""What is judged without any measurement: facts and links that are pretended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helixpipe.plan.simulation.link_needs import LinkNeed
from helixpipe.preflight.checks import GIB, Link, check_clocks, check_facts, check_links
from helixpipe.preflight.facts import Facts
from helixpipe.preflight.flight import Outcome
from helixpipe.preflight.table import print_outcome
from helixpipe.reliability.exit_codes import BAD_DATA, BAD_HOST, BAD_USAGE

GOOD = Facts(
    host="n0", versions={"version of torch": "2.13.0", "version of NCCL": "2.28.3"}, gpus=8, ranks=8,
    gpu="H20", gpu_total_bytes=96 * GIB, gpu_free_bytes=95 * GIB, gpu_tflops=130.0,
    gpu_clock_mhz=1980, scratch="/tmp", scratch_bytes=500 * GIB,
)  # fmt: skip
ON_CPU = Facts(host="n0", versions=GOOD.versions, scratch="/tmp", scratch_bytes=500 * GIB)


def hosts_with(fact, **wrong):
    """Four ranks on hosts of their own, the third with something wrong."""
    facts = [replace(fact, host=f"n{number}") for number in range(4)]
    facts[2] = replace(facts[2], **wrong)
    return facts


@pytest.mark.parametrize("fact", [GOOD, ON_CPU], ids=["gpu", "cpu"])
def test_nothing_is_wrong(fact):
    assert [check.problem for check in check_facts(hosts_with(fact))] == [""] * 6


@pytest.mark.parametrize(
    ("name", "wrong", "problem", "code"),
    [
        ("versions", {"versions": GOOD.versions | {"version of NCCL": "2.20.5"}},
         "version of NCCL is 2.20.5 on n2, 2.28.3 on most ranks", BAD_USAGE),
        ("versions", {"versions": {"version of torch": "2.13.0"}},
         "version of NCCL is missing on n2, 2.28.3 on most ranks", BAD_USAGE),
        ("GPUs", {"gpus": 7}, "n2 has 7 GPUs, most have 8", BAD_HOST),
        ("GPUs", {"gpu": "A800"}, "n2 has A800, most have H20", BAD_HOST),
        ("GPU memory", {"gpu_free_bytes": 40 * GIB}, "rank 2 on n2: 56.0 of 96.0 GiB of its GPU", BAD_HOST),
        ("GPU speed", {"gpu_tflops": 60.0}, "rank 2 on n2: 60 TFLOPS at 1980 MHz, most reach 130", BAD_HOST),
        ("local disk", {"scratch_error": "Read-only file system"},
         "n2 cannot write to /tmp (Read-only file system); set TMPDIR", BAD_HOST),
        ("local disk", {"scratch_bytes": 10**6}, "n2 has only 0.00 GiB in /tmp; set TMPDIR", BAD_HOST),
        ("job", {"job_error": "corpus.bin: cut", "job_code": 3}, "n2: corpus.bin: cut", BAD_DATA),
    ],
)  # fmt: skip
def test_the_host_that_differs_is_named(name, wrong, problem, code):
    found = [check for check in check_facts(hosts_with(GOOD, **wrong)) if check.problem]
    assert [(check.name, check.code) for check in found] == [(name, code)]
    assert found[0].problem.startswith(problem)


def test_ranks_that_share_a_gpu_are_not_blamed_for_it():
    shared = replace(GOOD, gpus=1, ranks=4, gpu_free_bytes=50 * GIB, gpu_tflops=1.0)
    assert not any(check.problem for check in check_facts([replace(shared, gpu_tflops=9.0), *[shared] * 3]))


def test_many_problems_are_one_line():
    facts = [replace(GOOD, host=f"n{i}", versions={"version of torch": str(i or 1)}) for i in range(9)]
    (found,) = (check for check in check_facts(facts) if check.problem)
    assert found.verdict.count("\n") == 0
    assert "and 3 more" in found.verdict


def test_a_clock_that_is_off():
    facts = hosts_with(ON_CPU)
    assert check_clocks(facts, [0.0, 0.01, -0.2, 0.3]).problem == ""
    # Rank 0's own clock may be the one that is wrong.
    assert check_clocks(facts, [0.0, 9.0, 9.0, 9.0]).problem == "the clock of n0 is -9.0 s off"


def test_a_message_must_not_take_longer_than_what_hides_it():
    need = {(0, 1): LinkNeed(10**9, 100.0)}
    facts = hosts_with(GOOD)
    for rate, latency_ms, is_slow in ((10.0, 0.0, False), (10.0, 0.01, True), (9.9, 0.0, True)):
        links = {(0, 2): Link(latency_ms, rate), (2, 0): Link(0.0, 0.001)}
        check = check_links(facts, links, need, 2)
        assert bool(check.problem) is is_slow, (rate, latency_ms)
        assert "rank 2 on n2 to rank 0" not in check.problem, "the plan sends nothing there"
    assert "rank 0 on n0 to rank 2 on n2: 954 MiB take 101 ms at 9.9 GB/s" in check.problem
    assert "takes 100 ms" in check.problem


def test_without_a_need_links_are_held_against_others_of_their_kind():
    facts = [replace(GOOD, host=f"n{rank // 2}") for rank in range(8)]
    within = {(rank, rank ^ 1): Link(0.01, 300.0) for rank in range(8)}
    between = {(rank, (rank + 2) % 8): Link(0.02, 40.0) for rank in range(8)}
    assert check_links(facts, within | between, {}, 8).problem == ""
    problem = check_links(facts, within | between | {(3, 5): Link(0.02, 10.0)}, {}, 8).problem
    assert problem == "rank 3 on n1 to rank 5 on n2: 10 GB/s, others of its kind 40"
    assert check_links(facts, {(0, 1): Link(0.01, 300.0), (1, 2): Link(0.01, 3.0)}, {}, 8).problem == ""


def test_what_is_printed(capsys):
    facts = [replace(GOOD, host=f"n{rank // 2}") for rank in range(4)]
    facts[3] = replace(facts[3], gpu_tflops=90.0)
    links = {(0, 2): Link(0.0213, 42.0), (2, 0): Link(0.018, 41.0)}
    checks = [*check_facts(facts), check_links(facts, links, {}, 2)]
    print_outcome(Outcome(8, checks, facts, [0.0, 0.0, 0.0023, 0.0023], links))
    lines = capsys.readouterr().out.splitlines()
    head = "host ranks GPU free GiB TFLOPS MHz local GiB clock ms sends GB/s us"
    assert lines[0].split() == head.split()
    assert lines[1].split() == "n0 0-1 8 x H20 95.0 130 1980 500 +0.0 42 21".split()
    assert lines[2].split() == "n1 2-3 8 x H20 95.0 90 1980 500 +2.3 41 18".split()
    assert len(lines) == 3 + len(checks) + 1
    assert lines[-1] == "preflight refused: GPU speed; exit code 8"
