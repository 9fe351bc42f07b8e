"""A training run on one page: loss, throughput, memory, slow ranks, the executed schedule, arguments."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helixpipe.report.page import write_page
from helixpipe.report.palette import FAINT, INK, RULE, STYLES
from helixpipe.report.role import Role
from helixpipe.report.run import Run
from helixpipe.report.stragglers import SLOW, slowness
from helixpipe.report.summary import LabelledTimeline

_COLOUR = STYLES[Role.FORWARD].fill
# Of the last timelines: clocks and caches make single ones differ.
_TIMELINES = 20


def write_run_page(run: Run, path: Path, *, title: str, iteration: int) -> None:
    """Write the page; equal runs give equal pages.

    Args:
        run: what is shown.
        path: the file.
        title: heading of the page.
        iteration: whose executed schedule is shown.

    Raises:
        ValueError: there is no timeline of the iteration.
    """
    shown = run.timeline(iteration)
    elapsed = {row["iteration"]: row["elapsed_ms"] for row in run.rows}.get(iteration)
    last = [run.timeline(number) for number in sorted(run.timelines)[-_TIMELINES:]]
    entry = LabelledTimeline(shown, f"Iteration {iteration}, as it was executed", elapsed)
    above = f"{_figures(run)}\n{_ranks(run, slowness(last))}"
    write_page([entry], path, title=title, above=above, below=_arguments(run))


def _figures(run: Run) -> str:
    """Loss, norm of the gradient and throughput by iteration, and the largest memory by rank."""
    numbers = [row["iteration"] for row in run.rows]
    with matplotlib.rc_context({"svg.hashsalt": "helixpipe", "font.family": "DejaVu Sans", "font.size": 8.5}):
        # White also on a dark page: the ink of the curves is made for it.
        figure = Figure(figsize=(11.0, 5.2), layout="constrained", facecolor="white")
        ((loss, norm), (speed, memory)) = figure.subplots(2, 2)
        _line(loss, numbers, [row["lm_loss"] for row in run.rows], "loss")
        _line(norm, numbers, [row.get("grad_norm") for row in run.rows], "norm of the gradient")
        _line(speed, numbers, [row["tokens_per_second"] for row in run.rows], "tokens per second")
        peaks = [
            max(ranks) / 2**30 for ranks in zip(*(row["peak_memory_bytes"] for row in run.rows), strict=True)
        ]
        memory.bar(range(len(peaks)), peaks, color=_COLOUR, width=0.7)
        _dress(memory, "largest memory of each rank (GiB)", "rank")
        memory.xaxis.set_major_locator(MaxNLocator(integer=True))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return f'<section class="card" aria-label="Iterations">\n<h2>Iterations</h2>\n{svg}</section>'


def _line(axes: Axes, numbers: Sequence[int], values: Sequence[float | None], title: str) -> None:
    pairs = [(number, value) for number, value in zip(numbers, values, strict=True) if value is not None]
    if pairs:
        axes.plot(
            *zip(*pairs, strict=True), color=_COLOUR, linewidth=1.4, marker="." if len(pairs) < 60 else ""
        )
    _dress(axes, title, "iteration")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _dress(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", color=INK)
    axes.set_xlabel(below, color=FAINT)
    axes.tick_params(colors=FAINT)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(RULE)


def _ranks(run: Run, ratios: Sequence[float]) -> str:
    """Pipeline ranks that are slow at what others do, too."""
    rows = [
        (f"{rank}", f"{ratio:.3f}", "slow" if ratio >= SLOW else "")
        for rank, ratio in enumerate(ratios)
    ]  # fmt: skip
    count = min(len(run.timelines), _TIMELINES)
    heading = f"Pipeline ranks: time for their operations over the median's, in the last {count} timelines"
    return _table(heading, ("rank", "time over median", ""), rows)


def _arguments(run: Run) -> str:
    return _table(
        "Arguments", ("option", "value"), [(name, str(v)) for name, v in sorted(run.arguments.items())]
    )


def _table(heading: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    body = "\n".join(lines)
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return (
        f'<section class="card" aria-label="{escape(heading)}">\n<h2>{escape(heading)}</h2>\n'
        f'<div class="scroller" tabindex="0">\n{table}</div></section>'
    )
