"""Timelines: when each rank ran each operation. Predicted and measured ones have this one form."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from helixpipe.plan.operation import Operation


class Span(NamedTuple):
    """One compute operation on one rank, in milliseconds since the start of the iteration."""

    operation: Operation
    start_ms: float
    end_ms: float


@dataclass(frozen=True)
class Timeline:
    """The compute operations of every rank with their times.

    Attributes:
        spans: per rank, in execution order.
        source: what it shows, like ``predicted`` or ``measured, iteration 20``.
        segment_names: of the plan that ran, so that a reader can tell attention; may be empty.
    """

    spans: tuple[tuple[Span, ...], ...]
    source: str = "predicted"
    segment_names: tuple[str, ...] = ()

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

    def is_attention(self, operation: Operation) -> bool:
        """True if the segment names are known and say so."""
        return bool(self.segment_names) and self.segment_names[operation.segment] == "attention"

    def to_json(self) -> str:
        """One line per rank; read back by :meth:`from_json`."""
        rows = ",\n".join(
            "    " + json.dumps([[str(op), round(start, 4), round(end, 4)] for op, start, end in rank])
            for rank in self.spans
        )
        segments = f'  "segments": {json.dumps(self.segment_names)},\n' if self.segment_names else ""
        return f'{{\n  "source": {json.dumps(self.source)},\n{segments}  "ranks": [\n{rows}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """Read a timeline; ``ValueError`` if the text is not one."""
        try:
            data: Any = json.loads(text)
            spans = tuple(
                tuple(Span(Operation.parse(op), float(start), float(end)) for op, start, end in rank)
                for rank in data["ranks"]
            )
            timeline = cls(spans, str(data["source"]), tuple(str(name) for name in data.get("segments", ())))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a timeline: {error}") from None
        timeline._check()
        return timeline

    def _check(self) -> None:
        for rank, spans in enumerate(self.spans):
            for op, start, end in spans:
                if not -math.inf < start <= end < math.inf:
                    raise ValueError(f"not a timeline: {op} on rank {rank} runs from {start} to {end} ms")
                if self.segment_names and op.segment >= len(self.segment_names):
                    raise ValueError(f"not a timeline: {op} on rank {rank} has no name in segments")
