"""The joint search in the terminal: the best layouts, the best of each family, bounds, and what to run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from helixpipe.plan.advise.bounds import least_ms
from helixpipe.plan.advise.job import GIB
from helixpipe.plan.advise.joint import Finding, JointAdvice
from helixpipe.plan.advise.limits import main_limit, time_shares
from helixpipe.plan.cost_model import Hardware, Pieces
from helixpipe.report.advice import describe_seconds
from helixpipe.report.console import table_console

# Piped output has no width of its own; the table needs this much.
_WIDTH = 184


def print_joint_advice(advice: JointAdvice, machine: Hardware | Pieces, explain: int | None) -> None:
    """Print what a joint search found, and the one that is to be explained.

    Raises:
        ValueError: there is no such number in the table.
    """
    console = table_console(_WIDTH)
    if explain is not None and explain > len(advice.shown):
        raise ValueError(f"--explain {explain}: the table has {len(advice.shown)} rows")
    if advice.findings:
        console.print(_table("The best", advice.shown, machine))
        console.print()
        console.print(_table("The best of each family", advice.best_of_families, machine))
    for line in (*_lines(advice), *(_explanation(advice.shown[explain - 1], machine) if explain else ())):
        # Arguments are to be copied: nothing may break or style them.
        console.print(line, soft_wrap=True, markup=False)


def _table(title: str, findings: Sequence[Finding], machine: Hardware | Pieces) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("", "layout", "schedule", "recompute"):
        table.add_column(name, no_wrap=True)
    for name in ("b", "m", "iteration", "tokens/s/GPU", "MFU", "GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("limited by", "runs"):
        table.add_column(name, no_wrap=True)
    for number, finding in enumerate(findings, 1):
        table.add_row(str(number), *cells(finding, machine).values())
    return table


def cells(finding: Finding, machine: Hardware | Pieces) -> dict[str, str]:
    """What a table says of a finding, by column."""
    option, candidate = finding.option, finding.option.candidate
    limit = main_limit(time_shares(finding, machine))
    why_not = candidate.why_not_runnable
    return {
        "layout": finding.layout.label,
        "schedule": candidate.label,
        "recompute": candidate.recompute_label,
        "b": str(candidate.micro_batch_size),
        "m": str(candidate.num_microbatches),
        "iteration": describe_seconds(finding.iteration_ms),
        "tokens/s/GPU": f"{option.tokens_per_second_per_gpu:.0f}",
        "MFU": f"{option.mfu:.1%}" if option.mfu else "?",
        "GiB": f"{finding.peak_bytes / GIB:.1f}",
        "limited by": f"{limit.name} {limit.milliseconds / finding.iteration_ms:.0%}",
        "runs": f"no: {why_not}" if why_not else "yes",
    }


def _lines(advice: JointAdvice) -> Iterable[str]:
    yield ""
    yield (
        f"{advice.num_layouts} layouts, {advice.num_candidates} candidates looked at, {advice.num_simulated} "
        "simulated. t, c, p, d, e: GPUs that share a layer, a sequence, the layers, the batch, experts; b: "
        "sequences in a micro batch; m: micro batches; GiB: of the worst GPU."
    )
    yield from (f"  {count} layouts rejected: {reason}" for reason, count in advice.num_rejected.items())
    if not advice.findings:
        yield "Nothing fits. Use more GPUs, shorter sequences or a larger --memory-limit-gib."
        return
    best = advice.findings[0]
    pieces = best.job.pieces_for(best.option.candidate.micro_batch_size)
    assert pieces is not None
    m = best.option.candidate.num_microbatches
    of_layout_ms = least_ms(pieces, best.layout.pipeline, m)
    yield ""
    yield (
        f"No schedule on the layout of the best takes less than {describe_seconds(of_layout_ms)}: it is "
        f"within {best.iteration_ms / of_layout_ms - 1:.1%} of any. No layout takes less than "
        f"{describe_seconds(advice.bound_ms)}: it is within {best.iteration_ms / advice.bound_ms - 1:.1%} of "
        "any layout and schedule, by these costs."
    )
    runs = advice.best_that_runs
    if runs is None:
        yield "None of these can be executed by pretrain_gpt.py."
        return
    yield f"Fastest that runs: {runs.layout.label}, {runs.option.candidate.label}, on every GPU:"
    yield "  " + " ".join(runs.option.candidate.arguments(runs.job))


def _explanation(finding: Finding, machine: Hardware | Pieces) -> Iterable[str]:
    option = finding.option
    yield ""
    yield f"{finding.layout.label}, {option.candidate.label}: {describe_seconds(finding.iteration_ms)}"
    for share in time_shares(finding, machine):
        yield (
            f"  {describe_seconds(share.milliseconds):>10} {share.milliseconds / finding.iteration_ms:6.1%}  "
            f"{share.name}"
        )
    assert option.costs is not None
    static = max(rank.static_bytes for rank in option.costs.ranks)
    messages = option.message_bytes or 0
    yield f"  {(option.peak_bytes + messages) / GIB:.1f} GiB on the worst GPU, of which:"
    yield f"  {static / GIB:10.1f} GiB weights, gradients, optimizer states and weights on loan"
    yield f"  {(option.peak_bytes - static) / GIB:10.1f} GiB activations and workspace"
    yield f"  {messages / GIB:10.1f} GiB buffers of messages"
    yield "  Arguments: " + " ".join(option.candidate.arguments(finding.job))
