"""Validation of plans that cut sequences: where the keys and values are that each slice reads."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from helixpipe.plan.context import Context
from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.plan_error import PlanError, grid, operations
from helixpipe.plan.segment_names import reads_context


class _Reading(NamedTuple):
    """A slice that reads the keys and values of an earlier one in a segment."""

    segment: int
    earlier: int
    later: int


def check_groups(plan: Plan) -> None:
    """A micro batch may end one sequence and begin another; what it has of a third could not be told apart.

    So every micro batch goes on with at most one sequence, and is gone on with by at most one.
    """
    groups = plan.slices
    members = [i for group in groups for i in group]
    inner = [i for group in groups for i in group[1:]], [i for group in groups for i in group[:-1]]
    counts = Counter(members)
    is_possible = (
        all(groups)
        and all(0 <= i < plan.num_microbatches for i in members)
        and all(len(set(group)) == len(group) for group in groups)
        and all(len(set(places)) == len(places) for places in inner)
        and all(len(group) > 1 or counts[group[0]] == 1 for group in groups)
    )
    if not is_possible:
        raise PlanError(
            "a micro batch is a slice of two sequences, other than the last of one and the first of the "
            "next, or of one that does not exist"
        )


def check_contexts(plan: Plan) -> None:
    """Each between two ranks, from the makers of keys and values to readers that have no other source."""
    groups: dict[int, set[int]] = defaultdict(set)
    for number, group in enumerate(plan.slices):
        for i in group:
            groups[i].add(number)
    served: Counter[_Reading] = Counter()
    names: Counter[tuple[int, Operation]] = Counter()
    for context in plan.contexts:
        if not _is_possible(plan, context, groups):
            raise PlanError(f"impossible context: {context}")
        names[context.owner, context.keys_sent] += 1
        if names[context.owner, context.keys_sent] > 1:
            raise PlanError(f"keys and values are lent to one rank twice: {context}")
        if any(plan.rank_of(context.segment - 1, i) != context.owner for i in context.lent):
            raise PlanError(f"keys and values are lent by another rank than makes them: {context}")
        if any(plan.rank_of(context.segment, i) != context.borrower for i in context.readers):
            raise PlanError(f"keys and values are lent to another rank than reads them: {context}")
        served.update(_Reading(context.segment, i, j) for i in context.lent for j in context.readers)
    for reading in dict.fromkeys((*_readings(plan), *served)):
        has_them = _is_at_home(plan, reading)
        if served[reading] != (0 if has_them else 1):
            raise PlanError(_wrong_source(plan, reading, served[reading], has_them=has_them))


def _is_possible(plan: Plan, context: Context, groups: Mapping[int, set[int]]) -> bool:
    members = (*context.lent, *context.readers)
    return (
        1 <= context.segment < plan.num_segments
        and reads_context(plan.segment_names[context.segment])
        and not reads_context(plan.segment_names[context.segment - 1])
        and 0 <= context.owner < plan.num_ranks
        and context.owner != context.borrower
        and bool(context.lent)
        and bool(context.readers)
        and all(i < j for i, j in pairwise(members))
        and bool(set.intersection(*(groups.get(i, set()) for i in members)))
        and (context.segment + 1 < plan.num_segments or not context.is_resent)
    )


def _readings(plan: Plan) -> Iterator[_Reading]:
    for segment, name in enumerate(plan.segment_names):
        if not reads_context(name):
            continue
        for group in plan.slices:
            if len({plan.rank_of(segment, i) for i in group}) == 1:
                # Each after the one before: that orders them all.
                yield from (_Reading(segment, earlier, later) for earlier, later in pairwise(group))
                continue
            for number, later in enumerate(group):
                yield from (_Reading(segment, earlier, later) for earlier in group[:number])


def _is_at_home(plan: Plan, reading: _Reading) -> bool:
    """True if the reader's rank has run the segment for the earlier slice, or has made what it reads."""
    rank = plan.rank_of(reading.segment, reading.later)
    return plan.rank_of(reading.segment, reading.earlier) == rank or _makes(plan, reading) == rank


def _makes(plan: Plan, reading: _Reading) -> int | None:
    """The rank that makes keys and values in a segment of their own; None if the segment itself does."""
    if reading.segment == 0 or reads_context(plan.segment_names[reading.segment - 1]):
        return None
    return plan.rank_of(reading.segment - 1, reading.earlier)


def _wrong_source(plan: Plan, reading: _Reading, count: int, *, has_them: bool) -> str:
    segment, earlier, later = reading
    what = f"slice {later} reads the keys and values of slice {earlier} in segment {segment}"
    if count:
        rank = plan.rank_of(segment, later)
        where = f"rank {rank} has them" if has_them else f"{count} contexts bring them"
        return f"{what}; {where}, lend them once, or not at all where they are"
    return (
        f"segment {segment} of slices {earlier} and {later} is placed on different ranks; {what}: "
        "keep it on one rank, or lend them with a context"
    )


def check_slices(plan: Plan) -> None:
    """Each slice after those whose keys and values, or gradients of them, it needs on its own rank."""
    at = {op: (rank, index) for rank, index, op in operations(plan) if op.kind in (Kind.F, Kind.B)}
    for reading in _readings(plan):
        segment, earlier, later = reading
        rank = plan.rank_of(segment, later)
        if plan.rank_of(segment, earlier) == rank:
            source = segment
        elif _makes(plan, reading) == rank:
            source = segment - 1
        else:
            continue  # A context brings them; its messages have places of their own.
        forwards = Operation(source, Kind.F, earlier), Operation(segment, Kind.F, later)
        backwards = Operation(segment, Kind.B, later), Operation(source, Kind.B, earlier)
        for first, second in (forwards, backwards) if plan.has_backward else (forwards,):
            if at[second] < at[first]:
                raise PlanError(f"{second} stands before {first}:\n{grid(plan, *at[second])}")


def check_places_of_contexts(plan: Plan) -> None:
    """A message of a context stands after all that it waits for, and before all that wait for it."""
    index = plan.context_index
    ends = {
        end: message
        for message in index.producers
        for end in ((message.sender, message.send), (message.receiver, message.receive))
    }
    for rank, order in enumerate(plan.orders):
        done: set[Operation] = set()
        for place, op in enumerate(order):
            message = ends.get((rank, op))
            if message is not None and op.kind.is_send and not index.producers[message] <= done:
                raise PlanError(f"{op} stands before what it sends:\n{grid(plan, rank, place)}")
            for needed in index.needed_by.get(op, ()):
                if needed.receive not in done:
                    raise PlanError(f"{op} stands before {needed.receive}:\n{grid(plan, rank, place)}")
            if message is not None and op.kind is Kind.RECV_KB:
                _check_dropped_before(message.context, done, op, grid(plan, rank, place))
            done.add(op)


def _check_dropped_before(context: Context, done: set[Operation], op: Operation, where: str) -> None:
    if not context.reading(Kind.F) <= done:
        raise PlanError(f"{op} brings again what forwards are still to read:\n{where}")
