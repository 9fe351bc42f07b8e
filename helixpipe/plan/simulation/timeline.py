"""Timelines: when each rank ran each operation. Predicted and measured ones have this one form."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from helixpipe.json_input import parse_object
from helixpipe.plan.operation import Operation
from helixpipe.plan.rows import json_rows
from helixpipe.plan.segment_names import role_of


class Span(NamedTuple):
    """One operation on one rank, in milliseconds since the start of the iteration."""

    operation: Operation
    start_ms: float
    end_ms: float


class Level(NamedTuple):
    """Bytes held from an instant until the next one."""

    time_ms: float
    bytes: int


@dataclass(frozen=True)
class Timeline:
    """What every rank did, and when.

    Attributes:
        spans: the compute operations per rank, in execution order.
        source: what it shows, like ``predicted`` or ``measured, iteration 20``.
        segment_names: of the plan that ran, so that a reader can tell attention; may be empty.
        waits: per rank, the receives that compute stood still for; empty if unknown.
        memory: per rank, bytes held over time, a step function; empty if unknown.
    """

    spans: tuple[tuple[Span, ...], ...]
    source: str = "predicted"
    segment_names: tuple[str, ...] = ()
    waits: tuple[tuple[Span, ...], ...] = ()
    memory: tuple[tuple[Level, ...], ...] = ()

    @property
    def start_ms(self) -> float:
        """The first start over all ranks; 0 if nothing runs."""
        return min((span.start_ms for rank in self.spans for span in rank), default=0.0)

    @property
    def makespan_ms(self) -> float:
        """From the first start to the last end over all ranks."""
        return max((span.end_ms for rank in self.spans for span in rank), default=0.0) - self.start_ms

    @property
    def busy_ms(self) -> list[float]:
        """Time in compute, per rank."""
        return [sum(span.end_ms - span.start_ms for span in rank) for rank in self.spans]

    @property
    def bubble_ratio(self) -> float:
        """Share of the ranks' time in which nothing is computed."""
        if self.makespan_ms == 0:
            return 0.0
        return 1.0 - sum(self.busy_ms) / (len(self.spans) * self.makespan_ms)

    @property
    def peak_bytes(self) -> list[int]:
        """Most bytes held at any time, per rank; empty if unknown."""
        return [max(level.bytes for level in curve) for curve in self.memory]

    def is_attention(self, operation: Operation) -> bool:
        """True if the segment names are known and say so."""
        return bool(self.segment_names) and role_of(self.segment_names[operation.segment]) == "attention"

    def to_json(self) -> str:
        """One line per rank; read back by :meth:`from_json`."""
        parts = [f'  "source": {json.dumps(self.source)}']
        if self.segment_names:
            parts.append(f'  "segments": {json.dumps(self.segment_names)}')
        parts.append(json_rows("ranks", map(_span_rows, self.spans)))
        if self.waits:
            parts.append(json_rows("waits", map(_span_rows, self.waits)))
        if self.memory:
            curves = ([[round(time, 4), held] for time, held in curve] for curve in self.memory)
            parts.append(json_rows("memory", curves))
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """Read a timeline; ``ValueError`` if the text is not one."""
        data = parse_object(text, "not a timeline")
        try:
            timeline = cls(
                _read_spans(data["ranks"]),
                str(data["source"]),
                tuple(str(name) for name in data.get("segments", ())),
                _read_spans(data.get("waits", ())),
                tuple(
                    tuple(Level(float(time), int(held)) for time, held in curve)
                    for curve in data.get("memory", ())
                ),
            )
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"not a timeline: {error}") from None
        timeline._check()
        return timeline

    def _check(self) -> None:
        for what, rows in (("waits", self.waits), ("memory", self.memory)):
            if len(rows) not in (0, len(self.spans)):
                raise ValueError(
                    f"not a timeline: {what} of {len(rows)} ranks, operations of {len(self.spans)}"
                )
        if not all(self.memory):
            raise ValueError("not a timeline: a rank's memory has no level")
        for rank, spans in enumerate((*self.spans, *self.waits)):
            for op, start, end in spans:
                if not -math.inf < start <= end < math.inf:
                    raise ValueError(
                        f"not a timeline: {op} on rank {rank % len(self.spans)} runs from {start} to {end} ms"
                    )
                if self.segment_names and op.segment >= len(self.segment_names):
                    raise ValueError(
                        f"not a timeline: {op} on rank {rank % len(self.spans)} has no name in segments"
                    )


def _span_rows(spans: tuple[Span, ...]) -> list[list[Any]]:
    return [[str(op), round(start, 4), round(end, 4)] for op, start, end in spans]


def _read_spans(ranks: Any) -> tuple[tuple[Span, ...], ...]:
    return tuple(
        tuple(Span(Operation.parse(op), float(start), float(end)) for op, start, end in rank)
        for rank in ranks
    )
