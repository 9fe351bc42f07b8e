"""A plan's computations by number, for what goes through all of them often: the clock, memory, bounds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from helixpipe.plan.operation import Kind, Operation

Numbers: TypeAlias = npt.NDArray[np.int64]

# Rows of a table of computations by kind.
_ROWS = {Kind.F: 0, Kind.B: 1, Kind.W: 2}
_KINDS = tuple(_ROWS)
NONE = -1


class ComputationClass(NamedTuple):
    """Computations that cost the same: of one kind and cost name, their micro batches with or without W."""

    kind: Kind
    name: str
    splits_backward: bool


class Edge(NamedTuple):
    """Messages that cost the same: between two segments, by cost name in forward direction, and two ranks."""

    producer: str
    consumer: str
    sender: int
    receiver: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Computations:
    """F, B and W of all ranks, numbered from 0, rank by rank in the order of execution.

    Attributes:
        operations: by number.
        begins: each rank's first, and behind the last rank's how many there are.
        table: the number of each by row of its kind, segment and micro batch; that of none is their count.
        inputs: of each, the one whose result it starts with; ``NONE`` if it needs none.
        receivers: of each, the rank that takes its result; ``NONE`` if none does.
        classes: by which durations and bytes differ.
        class_of: of each, its place in ``classes``.
        edges: by which messages differ.
        edge_of: of each, its message's place in ``edges``; ``NONE`` where its result stays on the rank.
    """

    operations: tuple[Operation, ...]
    begins: tuple[int, ...]
    table: Numbers
    inputs: Numbers
    receivers: Numbers
    classes: tuple[ComputationClass, ...]
    class_of: Numbers
    edges: tuple[Edge, ...]
    edge_of: Numbers

    @classmethod
    def of(
        cls,
        orders: Sequence[Sequence[Operation]],
        placement: Sequence[Sequence[int]],
        segment_names: Sequence[str],
        micro_batch_names: Sequence[str],
    ) -> Computations:
        """Number the computations of a plan that has these fields."""
        found = [[op for op in order if op.kind in _ROWS] for order in orders]
        operations = tuple(op for order in found for op in order)
        begins = np.cumsum([0, *map(len, found)])
        homes = np.array(placement, dtype=np.int64)
        kind = np.array([_ROWS[op.kind] for op in operations], dtype=np.int64)
        segment = np.array([op.segment for op in operations], dtype=np.int64)
        micro_batch = np.array([op.micro_batch for op in operations], dtype=np.int64)
        table = np.full((len(_ROWS), *homes.shape), len(operations), dtype=np.int64)
        table[kind, segment, micro_batch] = np.arange(len(operations))

        last = len(segment_names) - 1
        # A forward's result goes to the next segment, a backward's to the one before.
        step = np.select([kind == 0, kind == 1], [1, -1], 0)
        sends = (step != 0) & (segment + step >= 0) & (segment + step <= last)
        needs = (step != 0) & (segment - step >= 0) & (segment - step <= last)
        to, by = np.where(sends, segment + step, 0), np.where(needs, segment - step, 0)
        receivers = np.where(sends, homes[to, micro_batch], NONE)
        ranks = np.repeat(np.arange(len(found)), np.diff(begins))

        costs = _CostNames(segment_names, micro_batch_names)
        splits = np.zeros(homes.shape[1], dtype=np.int64)
        splits[micro_batch[kind == 2]] = 1
        classes, class_of = _distinct(kind, *costs.of(segment, micro_batch), splits[micro_batch])
        crosses = sends & (receivers != ranks)
        ends = np.minimum(segment, to), np.maximum(segment, to)
        first, second = (costs.of(end[crosses], micro_batch[crosses]) for end in ends)
        edges, crossing = _distinct(*first, second[0], ranks[crosses], receivers[crosses])
        edge_of = np.full(len(operations), NONE, dtype=np.int64)
        edge_of[crosses] = crossing
        return cls(
            operations=operations,
            begins=tuple(begins.tolist()),
            table=table,
            inputs=np.where(needs, table[kind, by, micro_batch], NONE),
            receivers=receivers,
            classes=tuple(
                ComputationClass(_KINDS[row], costs.name(own, of), bool(with_w))
                for row, own, of, with_w in classes
            ),
            class_of=class_of,
            edges=tuple(
                Edge(costs.name(one, of), costs.name(other, of), *two_ranks)
                for one, of, other, *two_ranks in edges
            ),
            edge_of=edge_of,
        )

    def number(self, operation: Operation) -> int:
        """The number of a computation; that of none is how many there are."""
        return int(self.table[_ROWS[operation.kind], operation.segment, operation.micro_batch])

    def last_of(self, segment: int, micro_batch: int) -> int:
        """The number of what completes the weight gradients of one micro batch in a segment: W, else B."""
        own = int(self.table[_ROWS[Kind.W], segment, micro_batch])
        return own if own < len(self.operations) else int(self.table[_ROWS[Kind.B], segment, micro_batch])

    def rank_of(self, number: int) -> int:
        """The rank that runs a computation."""
        return bisect_right(self.begins, number) - 1

    @cached_property
    def counts(self) -> Numbers:
        """How many computations of each class every rank has: a row for each rank."""
        return np.stack(
            [
                np.bincount(self.class_of[begin:end], minlength=len(self.classes))
                for begin, end in pairwise(self.begins)
            ]
        )


class _CostNames:
    """Cost names by two numbers: those of the segment's name and of the micro batch's."""

    def __init__(self, segment_names: Sequence[str], micro_batch_names: Sequence[str]) -> None:
        self._own, self._kinds = list(dict.fromkeys(segment_names)), list(dict.fromkeys(micro_batch_names))
        places = {name: place for place, name in enumerate(self._own)}
        self._of_segment = np.array([places[name] for name in segment_names], dtype=np.int64)
        places = {name: place for place, name in enumerate(self._kinds)}
        self._of_micro_batch = np.array([places[name] for name in micro_batch_names], dtype=np.int64)

    def of(self, segment: Numbers, micro_batch: Numbers) -> tuple[Numbers, Numbers]:
        """The two numbers."""
        kinds = self._of_micro_batch[micro_batch] if self._kinds else np.zeros_like(micro_batch)
        return self._of_segment[segment], kinds

    def name(self, own: int, kind: int) -> str:
        """The name."""
        return f"{self._own[own]}/{self._kinds[kind]}" if self._kinds else self._own[own]


def _distinct(*columns: Numbers) -> tuple[list[list[int]], Numbers]:
    """The rows of ``columns`` without repetition, and the place of each among them."""
    code = np.zeros_like(columns[0])
    for column in columns:
        code = code * (int(column.max(initial=0)) + 1) + column
    _, firsts, places = np.unique(code, return_index=True, return_inverse=True)
    return np.stack([column[firsts] for column in columns], axis=1).tolist(), places
