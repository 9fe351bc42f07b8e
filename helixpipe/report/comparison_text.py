"""A comparison of predicted and measured in the terminal."""

from __future__ import annotations

from rich.table import Table

from helixpipe.report.comparison import Comparison, Shares, verdict
from helixpipe.report.console import table_console

_WIDTH = 120
_WAITS_SHOWN = 8


def print_comparison(found: Comparison) -> None:
    """Print per-operation errors, where the time went, the longest waits and a verdict."""
    console = table_console(_WIDTH)
    for table in (_errors(found), _time(found), _waits(found)):
        console.print(table)
        console.print()
    for line in verdict(found):
        console.print(line, markup=False)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right", no_wrap=True)
    return table


def _errors(found: Comparison) -> Table:
    table = _table(
        f"Operations of {found.iterations} iterations", "segment", "kind", "count", "predicted ms",
        "mean ms", "median ms", "error", left=2,
    )  # fmt: skip
    for row in found.errors:
        table.add_row(
            row.name,
            row.kind,
            str(row.times),
            f"{row.predicted_ms:.2f}",
            f"{row.measured_ms:.2f}",
            f"{row.median_ms:.2f}",
            f"{row.error:+.1%}",
        )
    return table


def _time(found: Comparison) -> Table:
    table = _table(
        "An average rank's iteration", "", "compute ms", "waiting ms", "between ms", "makespan ms", "bubble"
    )

    def add(name: str, shares: Shares, makespan: float, bubble: float) -> None:
        values = (*shares, makespan)
        table.add_row(name, *(f"{value:.1f}" for value in values), f"{bubble:.1%}")

    for name, shares, timeline in (
        ("predicted", found.predicted_shares, found.predicted),
        ("measured", found.measured_shares, found.measured),
    ):
        add(name, shares, timeline.makespan_ms, timeline.bubble_ratio)
    return table


def _waits(found: Comparison) -> Table:
    source = "idle time before operations" if found.waits_are_gaps else "as traced"
    table = _table(f"The bubble by what was waited for ({source})", "rank", "message", "times", "ms", left=2)
    for wait in found.waits[:_WAITS_SHOWN]:
        table.add_row(str(wait.rank), wait.message, str(wait.times), f"{wait.milliseconds:.1f}")
    rest = found.waits[_WAITS_SHOWN:]
    if rest:
        table.add_row(
            "", "all others", str(sum(w.times for w in rest)), f"{sum(w.milliseconds for w in rest):.1f}"
        )
    return table
