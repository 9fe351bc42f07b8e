"""A training run on one page: loss, throughput, memory, slow ranks, the executed schedule, arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from helixpipe.report.page import write_page
from helixpipe.report.page_sections import drawing, dress, figure_section, new_figure, table_section
from helixpipe.report.palette import STYLES
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
    with drawing():
        figure = new_figure(11.0, 5.2)
        ((loss, norm), (speed, memory)) = figure.subplots(2, 2)
        _line(loss, numbers, [row["lm_loss"] for row in run.rows], "loss")
        _line(norm, numbers, [row.get("grad_norm") for row in run.rows], "norm of the gradient")
        _line(speed, numbers, [row["tokens_per_second"] for row in run.rows], "tokens per second")
        peaks = [
            max(ranks) / 2**30 for ranks in zip(*(row["peak_memory_bytes"] for row in run.rows), strict=True)
        ]
        memory.bar(range(len(peaks)), peaks, color=_COLOUR, width=0.7)
        dress(memory, "largest memory of each rank (GiB)", "rank")
        memory.xaxis.set_major_locator(MaxNLocator(integer=True))
        return figure_section("Iterations", figure)


def _line(axes: Axes, numbers: Sequence[int], values: Sequence[float | None], title: str) -> None:
    pairs = [(number, value) for number, value in zip(numbers, values, strict=True) if value is not None]
    if pairs:
        axes.plot(
            *zip(*pairs, strict=True), color=_COLOUR, linewidth=1.4, marker="." if len(pairs) < 60 else ""
        )
    dress(axes, title, "iteration")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _ranks(run: Run, ratios: Sequence[float]) -> str:
    """Pipeline ranks that are slow at what others do, too."""
    rows = [
        (f"{rank}", f"{ratio:.3f}", "slow" if ratio >= SLOW else "")
        for rank, ratio in enumerate(ratios)
    ]  # fmt: skip
    count = min(len(run.timelines), _TIMELINES)
    heading = f"Pipeline ranks: time for their operations over the median's, in the last {count} timelines"
    return table_section(heading, ("rank", "time over median", "found"), rows)


def _arguments(run: Run) -> str:
    rows = [(name, str(value)) for name, value in sorted(run.arguments.items())]
    return table_section(f"{len(rows)} arguments", ("option", "value"), rows, is_closed=True)
