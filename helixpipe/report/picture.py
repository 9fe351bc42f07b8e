"""A timeline as a picture: one row per rank, one bar per operation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from helixpipe.plan.simulation.timeline import Span, Timeline
from helixpipe.report.memory_panel import draw_memory
from helixpipe.report.palette import FAINT, IDLE, INK, RULE, STYLES
from helixpipe.report.role import Role, role_of

_SUFFIXES = (".png", ".svg")
_DPI = 160
_WIDTH = 10.0  # inches: 1600 pixels
_LEFT, _RIGHT = 0.62, 0.18  # inches beside the rows
_ABOVE, _BELOW = 0.6, 0.52  # inches for the heading, and for the time axis with the legend
_MEMORY, _BETWEEN = 1.3, 0.5  # inches of the memory panel, and between the rows and it
_ROW, _MIN_ROW, _MAX_ROWS = 0.36, 0.12, 7.0  # inches of a row, and of all rows together
_BAR = 0.84  # share of a row's height
_DIGIT = 0.72  # width of a digit over its font size, with some air
_MIN_FONT = 5.5  # points; smaller digits only blur the bars
_GAP, _GAPLESS = 0.6, 2.0  # points: gap between bars, width of bars that stand without one
_POINTS = 72  # per inch


def draw_timeline(
    timeline: Timeline,
    path: str | Path,
    *,
    title: str | None = None,
    until_ms: float | None = None,
    memory: bool = False,
    memory_limit_bytes: int | None = None,
) -> None:
    """Draw ``timeline`` into ``path``; equal input gives equal SVG files.

    Args:
        timeline: predicted or measured. Time zero of the picture is its first start.
        path: a .png or .svg file.
        title: heading; the timeline's source if None.
        until_ms: end of the time axis, for pictures on one scale; the timeline's end if None.
        memory: add a panel with the memory of every rank over time.
        memory_limit_bytes: what a rank has, a line in that panel.

    Raises:
        ValueError: another suffix, an empty timeline, an axis that ends before it starts, memory of a
            timeline that does not know it, or a limit without memory.
    """
    if memory and not timeline.memory:
        raise ValueError("cannot draw memory: the timeline does not say how much was held")
    if memory_limit_bytes is not None and not (memory and memory_limit_bytes > 0):
        raise ValueError("a memory limit must be above 0 bytes and goes with a picture of memory")
    _draw(
        [(timeline, title)], Path(path), until_ms, _MEMORY + _BETWEEN if memory else 0.0, memory_limit_bytes
    )


def draw_timelines(
    timelines: Sequence[Timeline],
    path: str | Path,
    *,
    titles: Sequence[str] = (),
    until_ms: float | None = None,
) -> None:
    """Draw timelines one above the other, on one time axis.

    Args:
        timelines: the first is on top. Each begins at time zero of the picture.
        path: a .png or .svg file.
        titles: a heading for each; their sources if empty.
        until_ms: end of the time axis; the latest end if None.

    Raises:
        ValueError: another suffix, an empty timeline or none, or an axis that ends before it starts.
    """
    headings: Sequence[str | None] = titles or [None] * len(timelines)
    _draw(list(zip(timelines, headings, strict=True)), Path(path), until_ms)


def _draw(
    shown: Sequence[tuple[Timeline, str | None]],
    path: Path,
    until_ms: float | None,
    extra: float = 0.0,
    memory_limit_bytes: int | None = None,
) -> None:
    """Stack the pictures of timelines into one figure, and write it."""
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"cannot draw {path}: the name must end in {' or '.join(_SUFFIXES)}")
    if not shown or any(timeline.makespan_ms == 0 for timeline, _ in shown):
        raise ValueError("nothing to draw: the timeline is empty")
    if until_ms is not None and not 0 < until_ms < float("inf"):
        raise ValueError(f"the time axis must end after 0 ms, not at {until_ms:g}")
    end_ms = until_ms or max(timeline.makespan_ms for timeline, _ in shown)
    pictures = [_Picture(timeline, title, end_ms, extra) for timeline, title in shown]
    height = sum(picture.height for picture in pictures)
    # Without a salt of its own, matplotlib gives the ids in an SVG file random names.
    with matplotlib.rc_context({"svg.hashsalt": "helixpipe", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(_WIDTH, height), facecolor="white")
        top = height
        for picture in pictures:
            top -= picture.height
            picture.draw(_Canvas(figure, height, top), memory_limit_bytes)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=_DPI, metadata=metadata)


class _Canvas(NamedTuple):
    """A figure, in which inches are counted from the bottom of one picture."""

    figure: Figure
    height: float  # of the figure
    bottom: float  # of the picture in it

    def y(self, inches: float) -> float:
        """As a fraction of the figure."""
        return (self.bottom + inches) / self.height

    def panel(self, bottom: float, height: float) -> Axes:
        """Axes over the whole width."""
        width = (_WIDTH - _LEFT - _RIGHT) / _WIDTH
        return self.figure.add_axes((_LEFT / _WIDTH, self.y(bottom), width, height / self.height))


class _Picture:
    """One timeline: sizes in inches, and what is drawn at them.

    Args:
        timeline: what is drawn.
        title: its heading; its source if None.
        until_ms: end of its time axis.
        extra: inches below the rows, for the memory.
    """

    def __init__(self, timeline: Timeline, title: str | None, until_ms: float, extra: float) -> None:
        self.timeline = timeline
        self.title = title
        self.until_ms = until_ms
        self.start_ms = timeline.start_ms
        ranks = len(timeline.spans)
        self.row = max(_MIN_ROW, min(_ROW, _MAX_ROWS / ranks))
        self.extra = extra  # inches below the rows
        self.height = self.row * ranks + _ABOVE + _BELOW + extra
        self.inches_per_ms = (_WIDTH - _LEFT - _RIGHT) / until_ms
        self.font_size = min(8.5, 0.62 * _BAR * self.row * _POINTS)

    def draw(self, canvas: _Canvas, memory_limit_bytes: int | None) -> None:
        axes = canvas.panel(_BELOW + self.extra, self.height - _ABOVE - _BELOW - self.extra)
        self._axes(axes)
        self._bars(axes)
        self._heading(canvas)
        self._legend(canvas)
        if self.extra:
            axes = canvas.panel(_BELOW, _MEMORY)
            self._time_axis(axes)
            draw_memory(axes, self.timeline, memory_limit_bytes)

    def _axes(self, axes: Axes) -> None:
        ranks = len(self.timeline.spans)
        axes.set_ylim(ranks - 0.5, -0.5)  # rank 0 on top
        every = -(-ranks // int(_MAX_ROWS / 0.15))
        shown = range(0, ranks, every)
        axes.set_yticks(list(shown), [f"rank {rank}" for rank in shown])
        axes.tick_params(axis="y", labelsize=min(8.5, self.row * _POINTS * 0.8), colors=INK, length=0)
        self._time_axis(axes)
        if self.extra:
            axes.set_xlabel("")  # the panel below has the same axis, with its name

    def _time_axis(self, axes: Axes) -> None:
        axes.set_xlim(0, self.until_ms)
        axes.set_xlabel("time (ms)", fontsize=8, color=FAINT, labelpad=3, loc="right")
        axes.tick_params(axis="x", labelsize=8, colors=FAINT, length=3)
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(RULE)

    def _bars(self, axes: Axes) -> None:
        by_role: dict[Role, list[tuple[int, Span]]] = {}
        for rank, spans in enumerate(self.timeline.spans):
            for span in spans:
                by_role.setdefault(role_of(span.operation, self.timeline), []).append((rank, span))
        whole = [(float(rank), 0.0, self.timeline.makespan_ms) for rank in range(len(self.timeline.spans))]
        self._collection(axes, "idle", whole, IDLE)
        for role, bars in by_role.items():
            rectangles = [(float(rank), *self._times(span)) for rank, span in bars]
            self._collection(axes, role.value, rectangles, STYLES[role].fill)
            for rank, span in bars:
                self._number(axes, rank, span, STYLES[role].text)

    def _times(self, span: Span) -> tuple[float, float]:
        return span.start_ms - self.start_ms, span.end_ms - self.start_ms

    def _collection(
        self, axes: Axes, name: str, rectangles: list[tuple[float, float, float]], fill: str
    ) -> None:
        """All bars of one colour as one artist: thousands of patches would take many seconds."""
        rows, starts, ends = np.array(rectangles).T
        top, bottom = rows - _BAR / 2, rows + _BAR / 2
        corners = [(starts, top), (ends, top), (ends, bottom), (starts, bottom)]
        vertices = np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1)
        # White gaps part neighbours; narrow bars would vanish behind them.
        widths = (ends - starts) * self.inches_per_ms * _POINTS
        collection = PolyCollection(
            list(vertices),
            facecolors=fill,
            edgecolors="white",
            linewidths=np.where(widths < _GAPLESS, 0, np.minimum(_GAP, widths / 8)),
        )
        collection.set_gid(name.replace(" ", "-"))
        axes.add_collection(collection, autolim=False)

    def _number(self, axes: Axes, rank: int, span: Span, colour: str) -> None:
        start, end = self._times(span)
        number = str(span.operation.micro_batch)
        room = (end - start) * self.inches_per_ms * _POINTS
        size = min(self.font_size, room / (_DIGIT * len(number)))
        if size >= _MIN_FONT and end <= self.until_ms:
            axes.text(
                (start + end) / 2,
                rank,
                number,
                size=size,
                color=colour,
                ha="center",
                va="center_baseline",
            )

    def _heading(self, canvas: _Canvas) -> None:
        timeline, title = self.timeline, self.title
        left = _LEFT / _WIDTH
        facts = f"makespan {timeline.makespan_ms:.5g} ms · bubble {timeline.bubble_ratio:.1%}"
        if title:
            facts = f"{timeline.source} · {facts}"
        # Titles come from users: a dollar sign in them does not start a formula.
        plain: dict[str, Any] = {"ha": "left", "va": "top", "parse_math": False}
        text = canvas.figure.text
        text(
            left,
            canvas.y(self.height - 0.1),
            title or timeline.source,
            size=11,
            weight="bold",
            color=INK,
            **plain,
        )
        text(left, canvas.y(self.height - 0.35), facts, size=9, color=FAINT, **plain)

    def _legend(self, canvas: _Canvas) -> None:
        spans = (span for rank in self.timeline.spans for span in rank)
        occurring = {role_of(span.operation, self.timeline) for span in spans}
        handles = [Patch(facecolor=STYLES[role].fill, label=role.value) for role in Role if role in occurring]
        handles.append(Patch(facecolor=IDLE, label="idle"))
        # Beside the axis label, where a heading of any length leaves it alone.
        canvas.figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(_LEFT / _WIDTH, canvas.y(0.13)),
            ncols=len(handles),
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            borderaxespad=0,
            borderpad=0,
            handlelength=1.1,
            handleheight=0.9,
            handletextpad=0.45,
            columnspacing=1.3,
        )
