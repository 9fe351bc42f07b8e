"""Timelines as a Chrome trace-event file, which ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from helixpipe.plan.operation import Kind, Operation, input_of
from helixpipe.plan.simulation.timeline import Span, Timeline
from helixpipe.report.palette import STYLES, WAIT_TRACE_NAME
from helixpipe.report.role import role_of

_Event: TypeAlias = dict[str, Any]

_NS_PER_MS = 1_000_000
# At one instant a viewer needs a slice before the arrows that are tied to it.
_TURN = {"X": 0, "C": 1, "s": 2, "f": 3}


def write_perfetto(timelines: Sequence[Timeline], path: str | Path) -> None:
    """Write :func:`perfetto_trace` into ``path``.

    Raises:
        ValueError: nothing to show.
    """
    text = perfetto_trace(timelines)
    Path(path).write_text(text, encoding="utf-8")


def perfetto_trace(timelines: Sequence[Timeline]) -> str:
    """Trace-event JSON: a process per timeline, a thread per rank, a counter per rank's memory.

    Waits are slices between the operations; arrows lead from the operation that sends to the one that
    receives. Times count from the first event of each timeline, so that all start together. Perfetto colours
    slices by their names without digits: kind and segment name decide; chrome://tracing takes ``cname``.

    Raises:
        ValueError: no timelines, or one without operations.
    """
    if not timelines or any(not any(timeline.spans) for timeline in timelines):
        raise ValueError("nothing to show: there is no timeline, or one is empty")
    metadata: list[_Event] = []
    events: list[_Event] = []
    flows = count(1)
    for index, timeline in enumerate(timelines):
        process = _Process(timeline, index, flows)
        metadata += process.metadata()
        events += process.events()
    events.sort(key=lambda event: (event["ts"], _TURN[event["ph"]]))
    # One event per line: such files are searched with line tools, too.
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in (*metadata, *events))
    return f'{{"displayTimeUnit":"ms","traceEvents":[\n{lines}\n]}}\n'


class _Process:
    """One timeline. Processes and threads count from 1: viewers give 0 a meaning of its own."""

    def __init__(self, timeline: Timeline, index: int, flows: Iterator[int]) -> None:
        self.timeline = timeline
        self.index = index
        self.pid = index + 1
        self.flows = flows  # numbers of arrows, unique in the whole file
        self.origin_ms = min(
            [span.start_ms for rank in (*timeline.spans, *timeline.waits) for span in rank]
            + [level.time_ms for curve in timeline.memory for level in curve]
        )
        operations = [span.operation for rank in timeline.spans for span in rank]
        self.num_segments = len(timeline.segment_names) or 1 + max(op.segment for op in operations)

    def metadata(self) -> Iterator[_Event]:
        """Names, and the order in which processes and threads stand."""
        yield self._named("process_name", 0, name=self.timeline.source)
        yield self._named("process_sort_index", 0, sort_index=self.index)
        for rank in range(len(self.timeline.spans)):
            yield self._named("thread_name", rank + 1, name=f"rank {rank}")
            yield self._named("thread_sort_index", rank + 1, sort_index=rank)

    def events(self) -> Iterator[_Event]:
        for rank, spans in enumerate(self.timeline.spans):
            for span in spans:
                yield self._operation(rank, span)
        for rank, waits in enumerate(self.timeline.waits):
            for wait in waits:
                yield self._wait(rank, wait)
        yield from self._memory()
        yield from self._arrows()

    def _named(self, what: str, tid: int, **args: str | int) -> _Event:
        return {"ph": "M", "name": what, "pid": self.pid, "tid": tid, "ts": 0, "args": args}

    def _operation(self, rank: int, span: Span) -> _Event:
        op = span.operation
        role = role_of(op, self.timeline)
        name, args = f"{op.kind.value} {op.micro_batch}", {"operation": str(op)}
        if self.timeline.segment_names:
            args["segment name"] = self.timeline.segment_names[op.segment]
            name += f" · {args['segment name']}"
        event = self._slice(rank, span, name, role.value, STYLES[role].trace_name)
        event["args"] = {
            **args,
            "segment": op.segment,
            "micro batch": op.micro_batch,
            "duration ms": round(span.end_ms - span.start_ms, 6),
        }
        return event

    def _wait(self, rank: int, wait: Span) -> _Event:
        event = self._slice(rank, wait, f"wait for rank {wait.operation.peer}", "wait", WAIT_TRACE_NAME)
        event["args"] = {
            "message": str(wait.operation),
            "micro batch": wait.operation.micro_batch,
            "duration ms": round(wait.end_ms - wait.start_ms, 6),
        }
        return event

    def _slice(self, rank: int, span: Span, name: str, category: str, colour: str) -> _Event:
        start = self._ns(span.start_ms)
        # The difference of rounded times: slices that touch must not overlap by a rounding error.
        duration = self._ns(span.end_ms) - start
        return {
            "ph": "X",
            "name": name,
            "cat": category,
            "cname": colour,
            "pid": self.pid,
            "tid": rank + 1,
            "ts": start / 1000,
            "dur": duration / 1000,
        }

    def _memory(self) -> Iterator[_Event]:
        for rank, curve in enumerate(self.timeline.memory):
            last = None
            for level in curve:
                if level.bytes == last:
                    continue
                last = level.bytes
                yield {
                    "ph": "C",
                    "name": f"memory of rank {rank}",
                    "pid": self.pid,
                    "tid": rank + 1,
                    "ts": self._ns(level.time_ms) / 1000,
                    "args": {"bytes": level.bytes},
                }

    def _arrows(self) -> Iterator[_Event]:
        """From the operation that sends to the one that receives, where these are on different ranks."""
        place = {span.operation: (rank, span) for rank, row in enumerate(self.timeline.spans) for span in row}
        for op, (rank, span) in place.items():
            needed = input_of(op, self.num_segments)
            producer = place.get(needed) if needed else None
            if producer is None or producer[0] == rank:
                continue
            flow = next(self.flows)
            start, end = self._ns(producer[1].start_ms), self._ns(producer[1].end_ms)
            # A nanosecond before the end: at the end itself the slice is over and holds no arrow.
            yield self._arrow("s", flow, op, producer[0], max(start, end - 1))
            yield self._arrow("f", flow, op, rank, self._ns(span.start_ms))

    def _arrow(self, phase: str, flow: int, consumer: Operation, rank: int, time_ns: int) -> _Event:
        event = {
            "ph": phase,
            "name": "activation" if consumer.kind is Kind.F else "gradient",
            "cat": "message",
            "id": flow,
            "pid": self.pid,
            "tid": rank + 1,
            "ts": time_ns / 1000,
        }
        if phase == "f":
            event["bp"] = "e"  # ends in the slice around it, not in the next one
        return event

    def _ns(self, time_ms: float) -> int:
        return round((time_ms - self.origin_ms) * _NS_PER_MS)
