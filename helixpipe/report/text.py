"""A timeline as text: one row per rank, time to the right, readable without colour."""

from __future__ import annotations

import shutil
from enum import Enum
from typing import NamedTuple

from helixpipe.plan.simulation.timeline import Timeline
from helixpipe.report.role import Role, role_of

_MIN_COLUMNS = 16
# Share of the operations that need room for a form before the form is used at all.
_MOSTLY = 0.7

_LABELS = {
    Role.FORWARD: "F",
    Role.ATTENTION_FORWARD: "f",
    Role.BACKWARD: "B",
    Role.ATTENTION_BACKWARD: "b",
    Role.WEIGHT: "W",
}


# With one column per operation a single character has to carry both facts: its alphabet names the role,
# its place in the alphabet the micro batch. Raised is attention in both directions.
class Glyphs(NamedTuple):
    """Characters of a grid. The alphabets are in the order of the roles' labels, joined."""

    idle: str
    edge: str
    line: str
    between: str
    more: str
    alphabets: str

    def alphabet(self, role: Role) -> str:
        """The ten characters of a role."""
        first = 10 * list(_LABELS).index(role)
        return self.alphabets[first : first + 10]


UNICODE = Glyphs("·", "│", "─", "·", "…", "0123456789⁰¹²³⁴⁵⁶⁷⁸⁹abcdefghijᵃᵇᶜᵈᵉᶠᵍʰⁱʲABCDEFGHIJ")
ASCII = Glyphs(".", "|", "-", "-", "...", "0123456789KLMNOPQRSTabcdefghijklmnopqrstABCDEFGHIJ")


class _Cell(NamedTuple):
    role: Role
    micro_batch: int
    first: int
    last: int  # exclusive

    @property
    def width(self) -> int:
        return self.last - self.first

    @property
    def label(self) -> str:
        return f"{_LABELS[self.role]}{self.micro_batch}"


class _Form(Enum):
    """How much a cell says, from the most room to the least."""

    LABEL = "of the micro batch that follows"
    CHARACTER = "by micro batch mod 10"
    ROLE = "of any micro batch"

    def fits(self, cell: _Cell) -> bool:
        return cell.width >= {_Form.LABEL: len(cell.label), _Form.CHARACTER: 1, _Form.ROLE: 0}[self]

    def write(self, cell: _Cell, glyphs: Glyphs) -> str:
        if self is _Form.LABEL:
            return cell.label[: cell.width].ljust(cell.width, glyphs.line)
        if self is _Form.CHARACTER:
            return glyphs.alphabet(cell.role)[cell.micro_batch % 10] * cell.width
        return _LABELS[cell.role] * cell.width

    def legend(self, roles: set[Role], glyphs: Glyphs) -> str:
        def key(role: Role) -> str:
            return f"{glyphs.alphabet(role)[0]}{glyphs.more}" if self is _Form.CHARACTER else _LABELS[role]

        keys = ", ".join(f"{key(role)} {role.value}" for role in Role if role in roles)
        return f"{keys} {self.value}; {glyphs.idle} idle"


def text_grid(timeline: Timeline, width: int | None = None, glyphs: Glyphs = UNICODE) -> str:
    """Draw ``timeline`` in ``width`` columns (default: the terminal's).

    All columns are equally long and show what runs in their middle; operations shorter than a column
    may be left out. Where most operations have room, cells are labelled (``F3─``); in less room one character
    stands for both role and micro batch, and in the least for the role alone. The last line is the legend.

    Args:
        timeline: predicted or measured.
        width: columns of the text.
        glyphs: ``ASCII`` for a terminal that knows no others.

    Raises:
        ValueError: the timeline is empty.
    """
    if timeline.makespan_ms == 0:
        raise ValueError("nothing to draw: the timeline is empty")
    if width is None:
        width = shutil.get_terminal_size().columns
    ranks = [f"rank {rank}" for rank in range(len(timeline.spans))]
    margin = max(len(name) for name in ranks)
    columns, slot_ms = _slots(timeline, max(width - margin - 3, _MIN_COLUMNS))
    grid = _cells(timeline, slot_ms)
    cells = [cell for row in grid for cell in row]
    form = next(form for form in _Form if sum(map(form.fits, cells)) >= _MOSTLY * len(cells))
    facts = (
        timeline.source,
        f"makespan {timeline.makespan_ms:.6g} ms",
        f"bubble {timeline.bubble_ratio:.1%}",
        f"1 column = {slot_ms:.3g} ms",
    )
    lines = [f" {glyphs.between} ".join(facts)]
    for name, row in zip(ranks, grid, strict=True):
        text = [glyphs.idle] * columns
        for cell in row:
            text[cell.first : cell.last] = form.write(cell, glyphs)
        lines.append(f"{name:>{margin}} {glyphs.edge}{''.join(text)}{glyphs.edge}")
    lines.append(form.legend({cell.role for cell in cells}, glyphs))
    return "\n".join(lines)


def _slots(timeline: Timeline, available: int) -> tuple[int, float]:
    """Number and length of the columns that show the whole timeline."""
    shortest = min(end - start for rank in timeline.spans for _, start, end in rank)
    per_shortest = int(available * shortest / timeline.makespan_ms)
    if per_shortest < 1:
        return available, timeline.makespan_ms / available
    # Whole columns per operation give equal operations equal cells.
    slot_ms = shortest / per_shortest
    return _nearest(timeline.makespan_ms / slot_ms), slot_ms


def _cells(timeline: Timeline, slot_ms: float) -> list[list[_Cell]]:
    first_ms = timeline.start_ms

    def column(time_ms: float) -> int:
        return _nearest((time_ms - first_ms) / slot_ms)

    return [
        [_Cell(role_of(op, timeline), op.micro_batch, column(start), column(end)) for op, start, end in rank]
        for rank in timeline.spans
    ]


def _nearest(value: float) -> int:
    """Halves go up; round() sends them to even numbers, which makes equal operations unequal."""
    return int(value + 0.5)
