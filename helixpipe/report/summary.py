"""What a comparison says about a timeline in one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from helixpipe.plan.simulation.timeline import Span, Timeline
from helixpipe.report.byte_units import ByteUnit, byte_unit


@dataclass(frozen=True)
class LabelledTimeline:
    """A timeline in a comparison.

    Attributes:
        timeline: predicted or measured.
        title: what the reader knows it by; the timeline's source if empty.
        iteration_ms: the whole iteration, with what follows the pipeline; None if unknown.
        facts: more to know about it, by name, like ``{"fold": 2}``.
    """

    timeline: Timeline
    title: str = ""
    iteration_ms: float | None = None
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        """The title, or the source in its place."""
        return self.title or self.timeline.source


class Cell(NamedTuple):
    """One value of a summary table.

    Attributes:
        text: as shown; a dash if unknown.
        note: what goes with the value, like the rank it is from.
        best: True if no value of the column is better, one is worse, and this one is within its limit.
        too_much: True if the value is over its limit.
        operation: what the value is about, in text form; empty if nothing in particular.
    """

    text: str
    note: str = ""
    best: bool = False
    too_much: bool = False
    operation: str = ""


_Entry: TypeAlias = tuple[float | None, Cell]  # what is compared, and how it is shown
_UNKNOWN = Cell("–")


class Column(NamedTuple):
    """A column of a summary table, with a cell for every timeline."""

    name: str
    cells: list[Cell]


def summary_columns(entries: Sequence[LabelledTimeline], limit_bytes: int | None = None) -> list[Column]:
    """The columns of the table; those that no timeline has a value for are left out."""
    unit = byte_unit(largest_bytes([entry.timeline for entry in entries]))
    columns = [
        _duration_column("makespan", [entry.timeline.makespan_ms for entry in entries]),
        _duration_column("iteration", [entry.iteration_ms for entry in entries]),
        _column("bubble", [_bubble(entry.timeline) for entry in entries]),
        _column(
            "peak memory",
            [_peak(entry.timeline, unit, limit_bytes) for entry in entries],
        ),
        _column(
            "waiting, all ranks",
            [_waiting(entry.timeline) for entry in entries],
        ),
        _column(
            "longest wait",
            [_longest_wait(entry.timeline) for entry in entries],
        ),
    ]
    return [column for column in columns if any(cell != _UNKNOWN for cell in column.cells)]


def worst_wait(timeline: Timeline) -> tuple[int, Span] | None:
    """The longest wait for a message and the rank that waits; None if there is none or none is known."""
    waits = ((rank, wait) for rank, row in enumerate(timeline.waits) for wait in row)
    return max(waits, key=lambda wait: wait[1].end_ms - wait[1].start_ms, default=None)


def total_wait_ms(timeline: Timeline) -> float | None:
    """Time that compute stood still for messages, over all ranks; None if unknown."""
    if not timeline.waits:
        return None
    return sum(wait.end_ms - wait.start_ms for row in timeline.waits for wait in row)


def milliseconds(value: float) -> str:
    """A time for the eye, five digits of it."""
    return f"{value:,.0f} ms" if value >= 10_000 else f"{value:.5g} ms"


def largest_bytes(timelines: Sequence[Timeline]) -> int:
    """The highest peak over all ranks of all timelines; 0 if none is known."""
    return max((peak for timeline in timelines for peak in timeline.peak_bytes), default=0)


def _column(name: str, entries: Sequence[_Entry]) -> Column:
    """Marks the smallest values, unless all are equal: the less the better holds for every column."""
    known = [value for value, _ in entries if value is not None]
    best = min(known, default=0.0)
    tells = max(known, default=0.0) > best
    return Column(
        name,
        [cell._replace(best=tells and value == best and not cell.too_much) for value, cell in entries],
    )


def _duration_column(name: str, values: Sequence[float | None]) -> Column:
    best = min((value for value in values if value is not None), default=0.0)

    def entry(value: float | None) -> _Entry:
        if value is None:
            return None, _UNKNOWN
        return value, Cell(milliseconds(value), f"+{value / best - 1:.1%}" if value > best > 0 else "")

    return _column(name, [entry(value) for value in values])


def _bubble(timeline: Timeline) -> _Entry:
    return timeline.bubble_ratio, Cell(f"{timeline.bubble_ratio:.1%}")


def _peak(timeline: Timeline, unit: ByteUnit, limit_bytes: int | None) -> _Entry:
    ranks = timeline.peak_bytes
    if not ranks:
        return None, _UNKNOWN
    peak = max(ranks)
    where = "every rank" if min(ranks) == peak and len(ranks) > 1 else f"rank {ranks.index(peak)}"
    if limit_bytes is not None and peak > limit_bytes:
        return peak, Cell(unit.text(peak), f"{where}, over the limit", too_much=True)
    return peak, Cell(unit.text(peak), where)


def _waiting(timeline: Timeline) -> _Entry:
    total = total_wait_ms(timeline)
    return (None, _UNKNOWN) if total is None else (total, Cell(milliseconds(total)))


def _longest_wait(timeline: Timeline) -> _Entry:
    if not timeline.waits:
        return None, _UNKNOWN
    worst = worst_wait(timeline)
    if worst is None:
        return 0.0, Cell("none")
    rank, (receive, start_ms, end_ms) = worst
    return end_ms - start_ms, Cell(
        milliseconds(end_ms - start_ms),
        f"rank {rank} for {receive}",
        operation=_next_operation(timeline, rank, end_ms),
    )


def _next_operation(timeline: Timeline, rank: int, time_ms: float) -> str:
    """What a rank computes next, in text form; empty if nothing."""
    later = (str(span.operation) for span in timeline.spans[rank] if span.start_ms >= time_ms)
    return next(later, "")
