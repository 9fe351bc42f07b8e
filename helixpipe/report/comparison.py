"""Predicted against measured: how wrong each operation's time was, and where the bubble came from."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from helixpipe.plan.operation import Kind, Operation, input_of
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.costs import Costs, SegmentCost
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.simulation.timeline import Span, Timeline


class OperationError(NamedTuple):
    """Operations of one kind on segments of one name, in milliseconds.

    Where only some micro batches of a plan have W, the whole backward of the others has the kind ``B+W``.

    The mean is what adds up to the iteration; a median below it tells of a few that took much longer.
    """

    name: str
    kind: str
    times: int
    predicted_ms: float
    measured_ms: float
    median_ms: float

    @property
    def error(self) -> float:
        """Measured mean over predicted, less one."""
        return self.measured_ms / self.predicted_ms - 1 if self.predicted_ms else 0.0


class Shares(NamedTuple):
    """Where the time of an average rank went, in milliseconds per iteration.

    ``other`` is neither compute nor waiting for a message: packing, posting, the host.
    """

    busy: float
    waiting: float
    other: float


class Wait(NamedTuple):
    """Milliseconds per iteration that a rank stood still for one kind of message."""

    rank: int
    message: str
    times: int
    milliseconds: float


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        predicted, measured: timelines; of the measured iterations the median one.
        errors: by segment name and kind.
        predicted_shares, measured_shares: of an average rank.
        waits: measured, the longest first.
        waits_are_gaps: the trace does not know waits; idle time before an operation counts as one.
        iterations: how many were measured.
    """

    predicted: Timeline
    measured: Timeline
    errors: list[OperationError]
    predicted_shares: Shares
    measured_shares: Shares
    waits: list[Wait]
    waits_are_gaps: bool
    iterations: int

    @property
    def ratio(self) -> float:
        """Measured over predicted makespan."""
        return self.measured.makespan_ms / self.predicted.makespan_ms


def compare(plan: Plan, measured: Sequence[Timeline], costs: Costs | None) -> Comparison:
    """Hold measured iterations of ``plan`` against its simulation.

    Args:
        plan: what was executed.
        measured: at least one iteration.
        costs: predicted; None takes the measured mean of each kind of operation and free messages, so that
            what is left is waiting.

    Raises:
        ValueError: a timeline that is not this plan's.
    """
    for timeline in measured:
        _check(plan, timeline)
    durations = _durations(plan, measured)
    known = costs if costs is not None else _measured_costs(plan, durations)
    predicted = simulate(plan, known).timeline
    errors = [
        OperationError(
            name,
            "B+W" if is_whole and plan.splits_backward else kind.value,
            len(samples) // len(measured),
            known.duration_ms(kind, name, splits_backward=not is_whole),
            statistics.fmean(samples),
            statistics.median(samples),
        )
        for (name, kind, is_whole), samples in durations.items()
    ]
    middle = sorted(measured, key=lambda timeline: timeline.makespan_ms)[len(measured) // 2]
    waits = middle.waits or _gaps(plan, middle)
    return Comparison(
        predicted=predicted,
        measured=middle,
        errors=errors,
        predicted_shares=_shares(predicted, predicted.waits),
        measured_shares=_shares(middle, waits),
        waits=_grouped(plan, waits),
        waits_are_gaps=not middle.waits,
        iterations=len(measured),
    )


def _check(plan: Plan, timeline: Timeline) -> None:
    if len(timeline.spans) != plan.num_ranks:
        raise ValueError(
            f"{timeline.source}: {len(timeline.spans)} ranks, the plan has {plan.num_ranks}; give the "
            "plan.json that training wrote beside the timelines"
        )
    for rank, (spans, order) in enumerate(zip(timeline.spans, plan.orders, strict=True)):
        planned = [op for op in order if op.kind.is_compute]
        if [span.operation for span in spans] != planned:
            raise ValueError(
                f"{timeline.source}: rank {rank} ran other operations than the plan has; give the plan.json "
                "that training wrote beside the timelines"
            )


# Segment, kind, and whether it is a B that is the whole backward pass.
_Group: TypeAlias = tuple[str, Kind, bool]


def _durations(plan: Plan, measured: Iterable[Timeline]) -> dict[_Group, list[float]]:
    samples: dict[_Group, list[float]] = defaultdict(list)
    for timeline in measured:
        for spans in timeline.spans:
            for op, start, end in spans:
                is_whole = op.kind is Kind.B and op.micro_batch not in plan.split_micro_batches
                samples[plan.cost_name(op.segment, op.micro_batch), op.kind, is_whole].append(end - start)
    order = {name: number for number, name in enumerate(plan.cost_names)}
    return dict(sorted(samples.items(), key=lambda item: (order[item[0][0]], item[0][1].value != "F")))


def _measured_costs(plan: Plan, durations: Mapping[_Group, list[float]]) -> Costs:
    """Means; where some micro batches have W, B and W are theirs."""

    def mean(name: str, kind: Kind, is_whole: bool = False) -> float:
        return statistics.fmean(durations.get((name, kind, is_whole), [0.0]))

    return Costs(
        {
            name: SegmentCost(
                mean(name, Kind.F), mean(name, Kind.B, not plan.splits_backward), mean(name, Kind.W)
            )
            for name in plan.cost_names
        },
        {},
    )


def _gaps(plan: Plan, timeline: Timeline) -> tuple[tuple[Span, ...], ...]:
    """Idle time before operations whose input comes from another rank, as waits for it."""
    waits = []
    for rank, spans in enumerate(timeline.spans):
        found = []
        free_ms = timeline.start_ms
        for op, start, end in spans:
            needed = input_of(op, plan.num_segments)
            if needed is not None and start > free_ms:
                receive = plan.receive_of(needed)
                if receive.peer != rank:
                    found.append(Span(receive, free_ms, start))
            free_ms = end
        waits.append(tuple(found))
    return tuple(waits)


def _shares(timeline: Timeline, waits: Sequence[Sequence[Span]]) -> Shares:
    """Of an average rank over the whole makespan; what follows a rank's last operation is waiting, too."""
    ranks = len(timeline.spans)
    busy = sum(timeline.busy_ms) / ranks
    end = timeline.start_ms + timeline.makespan_ms
    tails = sum(end - spans[-1].end_ms for spans in timeline.spans if spans)
    waiting = (sum(w.end_ms - w.start_ms for rank in waits for w in rank) + tails) / ranks
    return Shares(busy, waiting, max(0.0, timeline.makespan_ms - busy - waiting))


def _grouped(plan: Plan, waits: Sequence[Sequence[Span]]) -> list[Wait]:
    total: Counter[tuple[int, str]] = Counter()
    count: Counter[tuple[int, str]] = Counter()
    for rank, spans in enumerate(waits):
        for op, start, end in spans:
            key = rank, f"{_content(plan, op)} from rank {op.peer}"
            total[key] += end - start  # type: ignore[assignment]
            count[key] += 1
    return [
        Wait(rank, message, count[rank, message], milliseconds)
        for (rank, message), milliseconds in sorted(total.items(), key=lambda item: -item[1])
    ]


def _content(plan: Plan, receive: Operation) -> str:
    """What a message carries, by the names of the segments that it concerns."""
    name = plan.segment_names[receive.segment]
    if receive.kind is Kind.RECV_P:
        return f"weights of {name}"
    if receive.kind is Kind.RECV_G:
        return f"gradients of weights of {name}"
    if receive.kind in (Kind.RECV_K, Kind.RECV_KB):
        return f"keys and values for {name}"
    if receive.kind is Kind.RECV_D:
        return f"gradients of keys and values of {name}"
    following = plan.segment_names[receive.segment + 1]
    if receive.kind is Kind.RECV_F:
        return f"activations {name}->{following}"
    return f"gradients {name}<-{following}"


def verdict(found: Comparison) -> list[str]:
    """What to make of it, in sentences."""
    before, after = found.predicted_shares, found.measured_shares
    difference = found.measured.makespan_ms - found.predicted.makespan_ms
    lines = [
        f"Measured {found.measured.makespan_ms:.1f} ms, predicted {found.predicted.makespan_ms:.1f} ms: "
        f"{found.ratio:.2f}x."
    ]
    causes = {
        "operations that took longer": after.busy - before.busy,
        "more waiting for messages": after.waiting - before.waiting,
        "time between operations": after.other - before.other,
    }
    if abs(difference) > 0.02 * found.predicted.makespan_ms:
        cause, part = max(causes.items(), key=lambda item: item[1] if difference > 0 else -item[1])
        sign = "+" if part >= 0 else ""
        lines.append(
            f"Of the {difference:+.1f} ms, {sign}{part:.1f} ms on an average rank are {cause}"
            + (" (less, in fact)." if part < 0 else ".")
        )
    else:
        lines.append("The prediction holds within 2%.")
    worst = max(found.errors, key=lambda row: abs(row.measured_ms - row.predicted_ms) * row.times)
    if abs(worst.error) > 0.05:
        lines.append(
            f"The prediction that cost most: {worst.kind} of {worst.name}, {worst.error:+.0%} over "
            f"{worst.times} operations."
        )
    if found.waits:
        first = found.waits[0]
        share = first.milliseconds / found.measured.makespan_ms
        lines.append(
            f"The longest wait: rank {first.rank} for {first.message}, {first.milliseconds:.1f} ms "
            f"({share:.0%} of the iteration)."
        )
    return lines
