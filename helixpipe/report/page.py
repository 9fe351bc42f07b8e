"""Timelines side by side on one HTML page that needs no network.

The drawing code is our own, 45 KB in ``assets``: inlined, Bokeh would add 1.3 MB and Plotly 4.8 MB to every
page, and rows averaged within a pixel, which keep 64 ranks x 2,000 operations fluent,
would still be our own work.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from helixpipe.plan.operation import Kind
from helixpipe.plan.simulation.timeline import Level, Span, Timeline
from helixpipe.report.byte_units import ByteUnit, byte_unit
from helixpipe.report.palette import LIMIT, STYLES, rank_colour
from helixpipe.report.role import Role, role_of
from helixpipe.report.summary import Cell, LabelledTimeline, largest_bytes, milliseconds, summary_columns

_SCRIPTS = ("model.js", "draw.js", "timeline_panel.js", "page.js")
_ROLES = tuple(Role)
_KINDS = {
    Role.FORWARD: Kind.F,
    Role.ATTENTION_FORWARD: Kind.F,
    Role.BACKWARD: Kind.B,
    Role.ATTENTION_BACKWARD: Kind.B,
    Role.WEIGHT: Kind.W,
}
_MESSAGES = tuple(kind for kind in Kind if kind.is_receive)  # numbered alike in model.js
_DIGITS = 8  # of times in the page: a tick is at most this small a part of the makespan
_LEVELS = 1_000_000  # steps of a memory curve
_KEY_RANKS = 8  # rank colours that a legend explains; the others lie between them


def write_page(
    timelines: Sequence[Timeline | LabelledTimeline],
    path: str | Path,
    *,
    title: str,
    memory_limit_bytes: int | None = None,
    above: str = "",
    below: str = "",
) -> None:
    """Write one HTML file that compares ``timelines``; equal input gives equal files.

    Args:
        timelines: what is shown, in this order, on one time axis; a labelled one says more.
        path: the file.
        title: heading of the page.
        memory_limit_bytes: what a rank has, drawn as a line into every memory plot.
        above, below: sections of HTML around the timelines.

    Raises:
        ValueError: nothing to show, an empty timeline or a limit that is not positive.
    """
    entries = [LabelledTimeline(shown) if isinstance(shown, Timeline) else shown for shown in timelines]
    if not entries:
        raise ValueError("nothing to show: there is no timeline")
    for entry in entries:
        if entry.timeline.makespan_ms == 0:
            raise ValueError(f"nothing to show: the timeline {entry.heading!r} is empty")
    if memory_limit_bytes is not None and memory_limit_bytes <= 0:
        raise ValueError(f"the memory limit must be above 0 bytes, not {memory_limit_bytes}")
    peak = largest_bytes([entry.timeline for entry in entries])
    unit = byte_unit(max(peak, memory_limit_bytes or 0))
    parts = {
        "title": escape(title),
        "lead": escape(_lead(entries)),
        "style": _palette_rules() + _asset("page.css"),
        "table": _table(entries, memory_limit_bytes),
        "legend": _legend(entries),
        "panels": "\n".join(_section(number, entry, unit) for number, entry in enumerate(entries, 1)),
        "above": above,
        "below": below,
        "data": _embedded(_page_data(entries, unit, memory_limit_bytes)),
        "script": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    # In one pass: a title that looks like a placeholder stays a title.
    html = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))
    Path(path).write_text(html, encoding="utf-8")


def _asset(name: str) -> str:
    return files("helixpipe.report").joinpath("assets", name).read_text(encoding="utf-8")


def _embedded(data: object) -> str:
    """JSON that can stand in a script element: no text in it can end the element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _lead(entries: Sequence[LabelledTimeline]) -> str:
    timelines = [entry.timeline for entry in entries]
    ranks = sorted({len(timeline.spans) for timeline in timelines})
    operations = sum(len(rank) for timeline in timelines for rank in timeline.spans)
    many = "one timeline" if len(timelines) == 1 else f"{len(timelines)} timelines on one time axis"
    return (
        f"{many} · {' or '.join(map(str, ranks))} rank{'s' if ranks[-1] > 1 else ''} · "
        f"{operations:,} operations"
    )


def _palette_rules() -> str:
    colours = [f"--{role.name.lower().replace('_', '-')}: {STYLES[role].fill};" for role in Role] + [
        f"--limit: {LIMIT};"
    ]
    return f":root {{ {' '.join(colours)} }}\n"


def _legend(entries: Sequence[LabelledTimeline]) -> str:
    occurring = {
        role_of(span.operation, entry.timeline)
        for entry in entries
        for rank in entry.timeline.spans
        for span in rank
    }
    names = [(role.name.lower().replace("_", "-"), role.value) for role in Role if role in occurring]
    if any(any(entry.timeline.waits) for entry in entries):
        names.append(("wait", "waiting for a message"))
    names.append(("idle", "idle"))
    return "".join(f'<li><i class="swatch {name}"></i>{text}</li>' for name, text in names)


def _table(entries: Sequence[LabelledTimeline], limit_bytes: int | None) -> str:
    columns = summary_columns(entries, limit_bytes)
    head = "".join(f'<th scope="col">{column.name}</th>' for column in columns)
    rows = []
    for number, entry in enumerate(entries, 1):
        cells = "".join(_table_cell(column.cells[number - 1], number) for column in columns)
        heading = f'<a href="#timeline-{number}">{escape(entry.heading)}</a>'
        source = f"<small>{escape(entry.timeline.source)}</small>" if entry.title else ""
        rows.append(f'<tr><th scope="row">{heading}{source}</th>{cells}</tr>')
    body = "\n".join(rows)
    return f'<thead><tr><th scope="col">timeline</th>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>'


def _table_cell(cell: Cell, number: int) -> str:
    classes = [name for name, holds in (("best", cell.best), ("over", cell.too_much)) if holds]
    attribute = f' class="{" ".join(classes)}"' if classes else ""
    text = cell.text
    if cell.best:
        text += '<span class="mark" title="best of the column"><span class="unseen">, best</span></span>'
    note = cell.note
    if cell.operation:
        note = f'<a href="#op={cell.operation}&amp;in={number}">{note}</a>'
    return f"<td{attribute}>{text}{f'<small>{note}</small>' if note else ''}</td>"


def _section(number: int, entry: LabelledTimeline, unit: ByteUnit) -> str:
    timeline = entry.timeline
    heading, ranks = escape(entry.heading), len(timeline.spans)
    facts = {
        **({"source": timeline.source} if entry.title else {}),
        "makespan": milliseconds(timeline.makespan_ms),
        "bubble": f"{timeline.bubble_ratio:.1%}",
        **entry.facts,
    }
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items()
    )
    memory = ""
    key = f"memory held per rank ({unit.name})"
    if timeline.memory:
        memory = (
            f'<div class="memory-key"><span>{key}</span><ul>{_rank_key(ranks)}</ul></div>'
            f'<canvas class="memory" role="img" aria-label="Memory over time of {heading}, '
            f'{ranks} curves"></canvas>'
        )
    return (
        f'<section class="panel card" id="timeline-{number}" aria-labelledby="heading-{number}">'
        f'<h2 id="heading-{number}">{heading}</h2><dl class="facts">{listed}</dl>'
        f'<div class="view"><canvas class="bars" tabindex="0" role="application" aria-describedby="keys" '
        f'aria-label="Operations of {heading} over time, {ranks} ranks"></canvas>{memory}'
        f'<canvas class="overlay" aria-hidden="true"></canvas></div>'
        f'<p class="details" aria-live="polite"></p></section>'
    )


def _rank_key(ranks: int) -> str:
    shown = min(ranks, _KEY_RANKS)
    picked = [round(place * (ranks - 1) / max(shown - 1, 1)) for place in range(shown)]
    return "".join(
        f'<li><i class="swatch" style="background:{rank_colour(rank, ranks)}"></i>{rank}</li>'
        for rank in picked
    )


def _page_data(
    entries: Sequence[LabelledTimeline], unit: ByteUnit, limit_bytes: int | None
) -> dict[str, Any]:
    return {
        "roles": [
            {
                "name": role.value,
                "kind": _KINDS[role].value,
                "fill": STYLES[role].fill,
                "text": STYLES[role].text,
            }
            for role in _ROLES
        ],
        "limit": limit_bytes,
        "unit": {"name": unit.name, "size": unit.size},
        "timelines": [_timeline_data(entry.timeline) for entry in entries],
    }


def _timeline_data(timeline: Timeline) -> dict[str, Any]:
    """Times in whole ticks, each from the one before it: the numbers stay short, and so does the page."""
    tick_ms = 10.0 ** (math.floor(math.log10(timeline.makespan_ms)) - _DIGITS)
    clock = _Ticks(timeline.start_ms, tick_ms)
    quantum = max(1, -(-largest_bytes([timeline]) // _LEVELS))
    ranks = len(timeline.spans)
    return {
        "tick": tick_ms,
        "makespan": timeline.makespan_ms,
        "segments": list(timeline.segment_names),
        "spans": [_span_numbers(spans, timeline, clock) for spans in timeline.spans],
        "waits": [_wait_numbers(waits, clock) for waits in timeline.waits],
        "quantum": quantum,
        "memory": [_memory_numbers(curve, clock, quantum) for curve in timeline.memory],
        "colours": [rank_colour(rank, ranks) for rank in range(ranks)],
    }


class _Ticks:
    def __init__(self, start_ms: float, tick_ms: float) -> None:
        self.start_ms = start_ms
        self.tick_ms = tick_ms

    def __call__(self, time_ms: float) -> int:
        return round((time_ms - self.start_ms) / self.tick_ms)


def _span_numbers(spans: Iterable[Span], timeline: Timeline, clock: _Ticks) -> list[int]:
    """Role, segment, micro batch, gap since the last end, duration; and so on."""
    numbers: list[int] = []
    last = 0
    for op, start_ms, end_ms in spans:
        start, end = clock(start_ms), clock(end_ms)
        role = _ROLES.index(role_of(op, timeline))
        numbers += (role, op.segment, op.micro_batch, start - last, end - start)
        last = end
    return numbers


def _wait_numbers(waits: Iterable[Span], clock: _Ticks) -> list[int]:
    """Segment, kind as in ``_MESSAGES``, micro batch, sender, gap since the last end, duration; and so on."""
    numbers: list[int] = []
    last = 0
    for op, start_ms, end_ms in waits:
        start, end = clock(start_ms), clock(end_ms)
        peer = -1 if op.peer is None else op.peer
        numbers += (op.segment, _MESSAGES.index(op.kind), op.micro_batch, peer, start - last, end - start)
        last = end
    return numbers


def _memory_numbers(curve: Iterable[Level], clock: _Ticks, quantum: int) -> list[int]:
    """Ticks since the last change, change in quanta; and so on. Levels that change nothing are left out."""
    numbers: list[int] = []
    last_time, last_held = 0, 0
    for time_ms, num_bytes in curve:
        time, held = clock(time_ms), round(num_bytes / quantum)
        if numbers and held == last_held:
            continue
        numbers += (time - last_time, held - last_held)
        last_time, last_held = time, held
    return numbers
