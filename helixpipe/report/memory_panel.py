"""Memory over time as a panel of a picture: one line per rank."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from helixpipe.plan.simulation.timeline import Timeline
from helixpipe.report.byte_units import byte_unit
from helixpipe.report.palette import FAINT, INK, LIMIT, RULE, rank_colour

_KEY_RANKS = 8  # lines that the legend names; the colours of the others lie between theirs
_AIR = 1.08  # of the highest value, so that it does not touch the frame


def draw_memory(axes: Axes, timeline: Timeline, limit_bytes: int | None) -> None:
    """Draw every rank's memory into ``axes``, whose time axis is set up already, with a line at the limit."""
    peak = max(timeline.peak_bytes)
    top = max(peak, limit_bytes or 0)
    unit = byte_unit(top)
    ranks = len(timeline.memory)
    end_ms = timeline.makespan_ms
    lines = [
        axes.plot(
            [level.time_ms - timeline.start_ms for level in curve] + [end_ms],
            [level.bytes / unit.size for level in curve] + [curve[-1].bytes / unit.size],
            drawstyle="steps-post",
            linewidth=1.2 if ranks <= 16 else 0.7,
            color=rank_colour(rank, ranks),
            gid=f"memory-{rank}",
            label=f"rank {rank}",
        )[0]
        for rank, curve in enumerate(timeline.memory)
    ]
    axes.set_ylim(0, top / unit.size * _AIR or 1)
    axes.set_ylabel(unit.name, fontsize=8, color=FAINT)
    axes.locator_params(axis="y", nbins=4)
    axes.tick_params(axis="y", labelsize=8, colors=FAINT, length=0)
    axes.grid(axis="y", color=RULE, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    if limit_bytes is not None:
        axes.axhline(
            limit_bytes / unit.size, color=LIMIT, linewidth=1.1, linestyle=(0, (5, 3)), gid="memory-limit"
        )
    facts = f"memory held · peak {unit.text(peak)}"
    if limit_bytes is not None:
        facts += f" · limit {unit.text(limit_bytes)}"
    axes.set_title(facts, fontsize=9, color=INK, loc="left", pad=4)
    _legend(axes, lines)


def _legend(axes: Axes, lines: list[Line2D]) -> None:
    shown = min(len(lines), _KEY_RANKS)
    picked = [lines[round(place * (len(lines) - 1) / max(shown - 1, 1))] for place in range(shown)]
    # Above the panel, beside its title: inside it would cover curves.
    axes.legend(
        handles=picked,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=shown,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        borderaxespad=0.2,
        borderpad=0,
        handlelength=1.1,
        handletextpad=0.35,
        columnspacing=0.9,
    )
