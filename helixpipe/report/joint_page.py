"""A joint search on one page: time against memory, the best of each family, and their timelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from helixpipe.plan.advise.job import GIB
from helixpipe.plan.advise.joint import Finding, JointAdvice
from helixpipe.plan.cost_model import Hardware, Pieces
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.report.joint_advice import cells
from helixpipe.report.page import write_page
from helixpipe.report.page_sections import drawing, dress, figure_section, new_figure, table_section
from helixpipe.report.palette import FAINT, INK, LIMIT, rank_colour
from helixpipe.report.summary import LabelledTimeline

# What is slower than the best by more is of no interest, and would squeeze the rest.
_SLOWEST = 1.6
_MARKERS = "osD^vPhX"


def write_joint_page(advice: JointAdvice, machine: Hardware | Pieces, path: Path, *, title: str) -> None:
    """Write the page; equal searches give equal pages.

    Args:
        advice: of a search.
        machine: that was searched for.
        path: the file.
        title: heading of the page.

    Raises:
        ValueError: nothing fits, so there is nothing to show.
    """
    best = advice.best_of_families
    if not best:
        raise ValueError("--page has nothing to show: no candidate fits; see the reasons above")
    above = frontier_section(advice) + _families(best, machine)
    write_page(
        [_timeline(number, finding) for number, finding in enumerate(best, 1)],
        path,
        title=title,
        memory_limit_bytes=best[0].job.memory_limit_bytes,
        above=above,
    )


def frontier(findings: Sequence[Finding]) -> list[Finding]:
    """Those that no other beats in both time and memory, least memory first."""
    found: list[Finding] = []
    for finding in sorted(findings, key=lambda f: (f.peak_bytes, f.iteration_ms)):
        if not found or finding.iteration_ms < found[-1].iteration_ms:
            found.append(finding)
    return found


def frontier_section(advice: JointAdvice) -> str:
    """A section of HTML: time against memory."""
    best = advice.best_of_families
    slowest_ms = _SLOWEST * best[0].iteration_ms
    shown = [f for f in advice.simulated if f.iteration_ms <= slowest_ms]
    families = list(dict.fromkeys(f.family for f in (*best, *shown)))
    with drawing():
        figure = new_figure(11.0, 5.4)
        axes = figure.subplots()
        for number, family in enumerate(families):
            own = [f for f in shown if f.family == family]
            axes.scatter(
                [f.peak_bytes / GIB for f in own],
                [f.iteration_ms / 1e3 for f in own],
                s=22,
                marker=_MARKERS[number % len(_MARKERS)],
                color=rank_colour(number, len(families)),
                alpha=0.75,
                linewidths=0,
                label=f"{family} ({len(own)})",
            )
        edge = frontier([*shown, *best])
        axes.step(
            [f.peak_bytes / GIB for f in edge],
            [f.iteration_ms / 1e3 for f in edge],
            where="post",
            color=INK,
            linewidth=1.1,
            label="least time in so much memory",
        )
        _circle(axes, {n: f for n, f in enumerate(best, 1) if f.iteration_ms <= slowest_ms})
        axes.axvline(best[0].job.memory_limit_bytes / GIB, color=LIMIT, linewidth=1.0, linestyle="--")
        dress(axes, "seconds of an iteration", "GiB of the worst GPU; dashed: what it has")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, labelcolor=FAINT)
        hidden = len(advice.simulated) - len(shown)
        text = f"Time against memory: {len(shown)} that were simulated, in circles the best of each family"
        if hidden:
            text += f"; {hidden} slower than {_SLOWEST:g} times the best are left out"
        return figure_section(text, figure)


def _circle(axes: Axes, best: Mapping[int, Finding]) -> None:
    for number, finding in best.items():
        at = finding.peak_bytes / GIB, finding.iteration_ms / 1e3
        axes.annotate(str(number), at, xytext=(5, 5), textcoords="offset points", color=INK, weight="bold")
        axes.scatter(*at, s=90, facecolors="none", edgecolors=INK, linewidths=1.2)


def _families(best: Sequence[Finding], machine: Hardware | Pieces) -> str:
    columns = ("layout", "schedule", "recompute", "iteration", "tokens/s/GPU", "GiB", "limited by", "runs")
    rows = []
    for number, finding in enumerate(best, 1):
        told = cells(finding, machine)
        rows.append((f"{number}. {finding.family}", *(told[name] for name in columns)))
    return table_section("The best of each family", ("family", *columns), rows)


def _timeline(number: int, finding: Finding) -> LabelledTimeline:
    option = finding.option
    assert option.plan is not None
    assert option.costs is not None
    facts = {
        "family": finding.family,
        "layout": finding.layout.label,
        "recompute": option.candidate.recompute_label,
    }
    return LabelledTimeline(
        simulate(option.plan, option.costs).timeline,
        f"{number}. {finding.layout.label}, {option.candidate.label}",
        finding.iteration_ms,
        facts,
    )
