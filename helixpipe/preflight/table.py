"""What preflight prints: a row per host, a line per check."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from helixpipe.preflight.checks import GIB
from helixpipe.preflight.flight import Outcome

# Piped output has no width of its own; the table needs this much.
_WIDTH = 132


def print_outcome(outcome: Outcome) -> None:
    """The table, the verdicts, and one line that sums up."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    if outcome.facts:
        console.print(_table(outcome))
    for check in outcome.checks:
        console.print(check.verdict, soft_wrap=True, markup=False)
    failed = [check.name for check in outcome.checks if check.problem]
    end = f"refused: {', '.join(failed)}; exit code {outcome.code}" if failed else "passed"
    console.print(f"preflight {end}", soft_wrap=True, markup=False)


def _table(outcome: Outcome) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("host", no_wrap=True)
    for name in ("ranks", "GPU", "free GiB", "TFLOPS", "MHz", "local GiB", "clock ms", "sends GB/s", "us"):
        table.add_column(name, justify="right", no_wrap=True)
    ranks_of: dict[str, list[int]] = {}
    for rank, fact in enumerate(outcome.facts):
        ranks_of.setdefault(fact.host, []).append(rank)
    for host, ranks in ranks_of.items():
        table.add_row(host, *_cells(outcome, ranks))
    return table


def _cells(outcome: Outcome, ranks: Sequence[int]) -> Iterator[str]:
    """Of one host, the worst of its ranks."""
    facts = [outcome.facts[rank] for rank in ranks]
    links = [link for (sender, _), link in outcome.links.items() if sender in ranks]
    has_gpu = bool(facts[0].gpu)
    yield f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    yield f"{facts[0].gpus} x {facts[0].gpu}" if has_gpu else "none"
    yield f"{min(fact.gpu_free_bytes for fact in facts) / GIB:.1f}" if has_gpu else ""
    yield f"{min(fact.gpu_tflops for fact in facts):.0f}" if has_gpu else ""
    yield str(min(fact.gpu_clock_mhz for fact in facts) or "?") if has_gpu else ""
    yield f"{min(fact.scratch_bytes for fact in facts) / GIB:.0f}"
    yield f"{outcome.skews_s[ranks[0]] * 1e3:+.1f}" if outcome.skews_s else ""
    yield f"{min(link.gb_per_s for link in links):.3g}" if links else ""
    yield f"{max(link.latency_ms for link in links) * 1e3:.0f}" if links else ""
