"""Judges what ranks have told and measured: one check, one line, the host to blame by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, TypeVar

from helixpipe.plan.simulation.link_needs import LinkNeed
from helixpipe.plan.simulation.network import BYTES_PER_MS
from helixpipe.preflight.facts import Facts
from helixpipe.reliability.exit_codes import BAD_HOST, BAD_USAGE

GIB = 2**30
# A GPU of which this share is taken is used by another process.
_LEAST_FREE = 0.9
_LEAST_SCRATCH_BYTES = GIB
# Shares of the median below which a GPU is throttled, and a link broken: cables and cards fail by halves.
_LEAST_SPEED = 0.8
_LEAST_LINK = 0.4
# A median of fewer links says little.
_FEWEST_LINKS = 4
_MOST_SKEW_S = 1.0
_MAX_SHOWN = 4

T = TypeVar("T")
Pair = tuple[int, int]


@dataclass(frozen=True)
class Check:
    """What came of one check.

    Attributes:
        name: of the check.
        problem: what is wrong, and on which host; empty if nothing is.
        detail: what was found, if nothing is wrong.
        code: exit code if something is wrong.
    """

    name: str
    problem: str
    detail: str
    code: int = BAD_HOST

    @property
    def verdict(self) -> str:
        """One line."""
        return f"{self.name}: " + (f"FAILED: {self.problem}" if self.problem else f"ok ({self.detail})")


class Link(NamedTuple):
    """What a link was measured to do one way for one GPU, while the other pipelines use theirs."""

    latency_ms: float
    gb_per_s: float

    def message_ms(self, num_bytes: float) -> float:
        """Milliseconds of a message of one GPU."""
        return self.latency_ms + num_bytes / (self.gb_per_s * BYTES_PER_MS)


def check_facts(facts: Sequence[Facts]) -> list[Check]:
    """Everything that ranks can tell before they have a process group; ``facts`` by rank."""
    return [
        _check_versions(facts),
        _check_gpus(facts),
        _check_memory(facts),
        _check_speed(facts),
        _check_scratch(facts),
        _check_job(facts),
    ]


def check_arrival(name: str, code: int, detail: str, missing: str, place: str, reason: str = "") -> Check:
    """That all ranks have come somewhere.

    Args:
        name: of the check.
        code: exit code if they have not.
        detail: what came of it, if they have.
        missing: the ranks that have not, with their hosts; empty if all have.
        place: where they were waited for, and how long.
        reason: what one of them has said about it.
    """
    problem = f"{missing} did not come to {place}{reason and f' ({reason})'}" if missing else ""
    return Check(name, problem, detail, code)


def check_clocks(facts: Sequence[Facts], skews_s: Sequence[float]) -> Check:
    """That hosts agree on the time; ``skews_s`` is each rank's clock less rank 0's."""
    middle = median(skews_s)
    off = [
        f"the clock of {fact.host} is {skew - middle:+.1f} s off"
        for fact, skew in zip(facts, skews_s, strict=True)
        if abs(skew - middle) > _MOST_SKEW_S
    ]
    widest = max(skews_s) - min(skews_s)
    return Check("clocks", _few(off), f"within {widest:.2f} s")


def check_links(
    facts: Sequence[Facts], links: Mapping[Pair, Link], needs: Mapping[Pair, LinkNeed], num_stages: int
) -> Check:
    """That each link carries its messages while they are hidden, or, if that is not known, what others carry.

    Args:
        facts: by rank.
        links: by sender and receiver, ranks of the job.
        needs: by sender and receiver, stages of a pipeline, with the bytes of one GPU; empty if not known.
        num_stages: pipeline-parallel size. Megatron numbers the ranks of a stage one after the other.
    """
    if not links:
        return Check("links", "", "one stage sends no messages")
    ranks_per_stage = len(facts) // num_stages
    if needs:
        problems = [
            problem
            for (sender, receiver), link in sorted(links.items())
            if (need := needs.get((sender // ranks_per_stage, receiver // ranks_per_stage)))
            and (problem := _too_slow(_name(facts, (sender, receiver)), link, need))
        ]
    else:
        problems = _outliers(facts, links)
    slowest = min(link.gb_per_s for link in links.values())
    basis = "each hides its messages" if needs else "the plan's need is unknown; name --hardware or --costs"
    return Check("links", _few(problems), f"{len(links)} of at least {slowest:.3g} GB/s; {basis}")


def _too_slow(name: str, link: Link, need: LinkNeed) -> str:
    message_ms = link.message_ms(need.num_bytes)
    if message_ms <= need.compute_ms:
        return ""
    return (
        f"{name}: {need.num_bytes / 2**20:.3g} MiB take {message_ms:.3g} ms at {link.gb_per_s:.3g} GB/s, "
        f"the compute that hides them takes {need.compute_ms:.3g} ms"
    )


def _outliers(facts: Sequence[Facts], links: Mapping[Pair, Link]) -> list[str]:
    """Links far below others of their kind: within a host, or between two."""
    problems = []
    for within in (True, False):
        alike = {
            pair: link.gb_per_s
            for pair, link in sorted(links.items())
            if (facts[pair[0]].host == facts[pair[1]].host) is within
        }
        if len(alike) < _FEWEST_LINKS:
            continue
        usual = median(alike.values())
        problems += [
            f"{_name(facts, pair)}: {rate:.3g} GB/s, others of its kind {usual:.3g}"
            for pair, rate in alike.items()
            if rate < _LEAST_LINK * usual
        ]
    return problems


def _name(facts: Sequence[Facts], pair: Pair) -> str:
    ends = [f"rank {rank} on {facts[rank].host}" for rank in pair]
    return " to ".join(ends)


def _check_versions(facts: Sequence[Facts]) -> Check:
    problems = []
    for name in dict.fromkeys(name for fact in facts for name in fact.versions):
        found = [fact.versions.get(name, "missing") for fact in facts]
        usual = _most_common(found)
        problems += [
            f"{name} is {value} on {fact.host}, {usual} on most ranks"
            for fact, value in zip(facts, found, strict=True)
            if value != usual
        ]
    detail = ", ".join(f"{name.split()[-1]} {value}" for name, value in facts[0].versions.items())
    return Check("versions", _few(problems), detail, BAD_USAGE)


def _check_gpus(facts: Sequence[Facts]) -> Check:
    usual, count = _most_common([fact.gpu for fact in facts]), _most_common([fact.gpus for fact in facts])
    problems = [
        f"{fact.host} has {fact.gpu or 'no GPU'}, most have {usual or 'none'}"
        for fact in facts
        if fact.gpu != usual
    ]
    problems += [
        f"{fact.host} has {fact.gpus} GPUs, most have {count}" for fact in facts if fact.gpus != count
    ]
    detail = f"{count} x {usual} per host" if usual else "none: the ranks use CPUs and gloo"
    return Check("GPUs", _few(problems), detail)


def _check_memory(facts: Sequence[Facts]) -> Check:
    problems = [
        f"rank {rank} on {fact.host}: {(fact.gpu_total_bytes - fact.gpu_free_bytes) / GIB:.1f} of "
        f"{fact.gpu_total_bytes / GIB:.1f} GiB of its GPU are taken; end the process that has them"
        for rank, fact in enumerate(facts)
        # Ranks that share a GPU take some of it from each other.
        if fact.ranks <= fact.gpus and fact.gpu_free_bytes < _LEAST_FREE * fact.gpu_total_bytes
    ]
    least = min(fact.gpu_free_bytes for fact in facts) / GIB
    detail = f"at least {least:.1f} GiB are free on each GPU" if facts[0].gpu else "no GPU"
    return Check("GPU memory", _few(problems), detail)


def _check_speed(facts: Sequence[Facts]) -> Check:
    usual = median(fact.gpu_tflops for fact in facts)
    problems = [
        f"rank {rank} on {fact.host}: {fact.gpu_tflops:.0f} TFLOPS at {fact.gpu_clock_mhz or '?'} MHz, "
        f"most reach {usual:.0f}"
        for rank, fact in enumerate(facts)
        if fact.ranks <= fact.gpus and fact.gpu_tflops < _LEAST_SPEED * usual
    ]
    return Check("GPU speed", _few(problems), f"{usual:.0f} TFLOPS of bf16 products" if usual else "no GPU")


def _check_scratch(facts: Sequence[Facts]) -> Check:
    problems = [
        f"{fact.host} cannot write to {fact.scratch} ({fact.scratch_error}); set TMPDIR"
        if fact.scratch_error
        else f"{fact.host} has only {fact.scratch_bytes / GIB:.2f} GiB in {fact.scratch}; set TMPDIR"
        for fact in facts
        if fact.scratch_error or fact.scratch_bytes < _LEAST_SCRATCH_BYTES
    ]
    least = min(fact.scratch_bytes for fact in facts) / GIB
    return Check("local disk", _few(problems), f"at least {least:.0f} GiB free in {facts[0].scratch}")


def _check_job(facts: Sequence[Facts]) -> Check:
    refused = [fact for fact in facts if fact.job_error]
    problems = [f"{fact.host}: {fact.job_error}" for fact in refused]
    code = refused[0].job_code if refused else BAD_USAGE
    return Check("job", _few(problems), "its arguments and files are in order on every rank", code)


def _most_common(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def _few(problems: Iterable[str]) -> str:
    """The first of them, each once: ranks of a host tell the same."""
    found = list(dict.fromkeys(problems))
    more = f"; and {len(found) - _MAX_SHOWN} more" if len(found) > _MAX_SHOWN else ""
    return "; ".join(found[:_MAX_SHOWN]) + more
