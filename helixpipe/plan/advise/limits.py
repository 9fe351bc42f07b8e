"""Where the time of an iteration goes, and so what limits it."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from helixpipe.plan.advise.joint import Finding
from helixpipe.plan.advise.layouts import layout_job
from helixpipe.plan.cost_model import Hardware, Pieces, costs_of_plan
from helixpipe.plan.operation import Kind
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules import SCHEDULES
from helixpipe.plan.simulation.costs import Costs
from helixpipe.plan.simulation.simulate import simulate

# Links that take no time.
_FREE_GB_PER_S, _NO_MS = 1e12, 1e-9


class Share(NamedTuple):
    """A part of an iteration, in milliseconds, on the mean rank."""

    name: str
    milliseconds: float


def time_shares(finding: Finding, machine: Hardware | Pieces) -> list[Share]:
    """The parts of an iteration, which add up to it; the work itself first.

    Of a measured profile, what links within a rank and short kernels take is part of the work.
    """
    option, layout = finding.option, finding.layout
    plan, costs = option.plan, option.costs
    assert plan is not None
    assert costs is not None
    busy_ms, again_ms = _busy_ms(plan, costs)
    once_ms = busy_ms - again_ms

    def saved_ms(better: Hardware) -> float:
        workload = replace(finding.job.workload, context_parallel=1, gathers_keys=False)
        batch = finding.job.num_microbatches * finding.job.micro_batch_size * layout.data
        pieces = layout_job(better, workload, layout, batch).pieces_for(option.candidate.micro_batch_size)
        assert pieces is not None
        levels = option.candidate.levels(workload.model.num_layers)
        busy, again = _busy_ms(plan, costs_of_plan(pieces, plan, levels))
        return once_ms - (busy - again)

    exchanges_ms = short_ms = 0.0
    if isinstance(machine, Hardware):
        unlinked = replace(
            machine,
            nvlink_gb_per_s=_FREE_GB_PER_S,
            nic_gb_per_s=_FREE_GB_PER_S,
            latency_ms=_NO_MS,
            node_latency_ms=_NO_MS,
        )
        exchanges_ms = saved_ms(unlinked)
        short_ms = saved_ms(machine.without_short_kernel_losses())
    simulated = simulate(plan, costs)
    pipeline_ms = simulated.makespan_ms
    alone_ms = simulate(plan, replace(costs, network=None, message_bytes=None)).makespan_ms
    # Of sequences that follow one another, one is planned.
    repeats = SCHEDULES[plan.schedule].repeats_sequences
    times = option.candidate.num_microbatches if repeats else 1
    parts = {
        "work": once_ms - exchanges_ms - short_ms,
        "short kernels": short_ms,
        "exchanges within stages": exchanges_ms,
        "recomputation": again_ms,
        "bubble": alone_ms - busy_ms,
        "exposed messages": pipeline_ms - alone_ms,
    }
    shares = [Share(name, milliseconds * times) for name, milliseconds in parts.items()]
    return [*shares, Share("gradient sum and optimizer", simulated.finish_ms)]


def main_limit(shares: list[Share]) -> Share:
    """The largest part that is not the work itself."""
    return max(shares[1:], key=lambda share: share.milliseconds)


def _busy_ms(plan: Plan, costs: Costs) -> tuple[float, float]:
    """What the mean rank computes, and what of it repeats forward work."""
    work = plan.computations
    busy = again = 0.0
    for count, (kind, name, splits) in zip(work.counts.sum(axis=0).tolist(), work.classes, strict=True):
        busy += count * costs.duration_ms(kind, name, splits_backward=splits)
        again += count * costs.segments[name].recompute if kind is Kind.B else 0.0
    return busy / plan.num_ranks, again / plan.num_ranks
