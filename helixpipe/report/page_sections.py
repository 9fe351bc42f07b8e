"""Sections of a page beside its timelines: figures and tables."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helixpipe.report.palette import FAINT, INK, RULE


@contextmanager
def drawing() -> Iterator[None]:
    """Settings under which equal figures are equal files."""
    with matplotlib.rc_context({"svg.hashsalt": "helixpipe", "font.family": "DejaVu Sans", "font.size": 8.5}):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, white also on a dark page: the ink of its curves is made for it."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def dress(axes: Axes, title: str, below: str) -> None:
    """Give axes a title, a name of what runs to the right, and the page's colours."""
    axes.set_title(title, loc="left", color=INK)
    axes.set_xlabel(below, color=FAINT)
    axes.tick_params(colors=FAINT)
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(RULE)


def figure_section(heading: str, figure: Figure) -> str:
    """A section of HTML with a figure in it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return (
        f'<section class="card" aria-label="{escape(heading)}">\n<h2>{escape(heading)}</h2>\n{svg}</section>'
    )


def table_section(
    heading: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, is_closed: bool = False
) -> str:
    """A section of HTML with a table in it, closed until somebody opens it if it is one that few look for."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    body = "\n".join(lines)
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    title, table = f"<h2>{escape(heading)}</h2>", f'<div class="scroller" tabindex="0">\n{table}</div>'
    if is_closed:
        return f'<details class="card">\n<summary>{title}</summary>\n{table}</details>'
    return f'<section class="card" aria-label="{escape(heading)}">\n{title}\n{table}</section>'
