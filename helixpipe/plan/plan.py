"""The plan: who runs what, in which order, with its JSON and CSV forms."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

from helixpipe.json_input import parse_object
from helixpipe.plan.computations import Computations, Numbers
from helixpipe.plan.context import Context, ContextIndex
from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Kind, Operation, message_of
from helixpipe.plan.rows import json_rows
from helixpipe.plan.wiring import Wiring, borrowing

Order: TypeAlias = tuple[Operation, ...]
Parameter: TypeAlias = int | str

FORMAT = "helixpipe-plan"
VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Everything an iteration needs to be executed, simulated or drawn.

    Attributes:
        schedule: name of the schedule that made it.
        num_ranks: pipeline-parallel size p.
        num_microbatches: micro batches m per data-parallel replica and iteration.
        segment_names: one name per segment, in chain order; segments of equal cost share a name.
        placement: ``placement[segment][micro_batch]`` is the rank that runs F, B and W of it.
        orders: the operations of each rank, in execution order.
        parameters: the arguments of the schedule, for the reader and for reproduction.
        micro_batch_names: one name per micro batch where they differ in cost, like slices of a sequence;
            micro batches of equal cost share a name. Empty where all cost the same.
        slices: groups of micro batches that have consecutive slices of one sequence: on every segment
            that attends, the forward of a slice follows that of the slice before it, whose keys and values it
            reads, and backwards run in reverse. The last of one group may be the first of another.
        loans: weights that are used elsewhere than where they are owned.
        contexts: keys and values of slices that are read elsewhere than where they are made.
    """

    schedule: str
    num_ranks: int
    num_microbatches: int
    segment_names: tuple[str, ...]
    placement: tuple[tuple[int, ...], ...]
    orders: tuple[Order, ...]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    micro_batch_names: tuple[str, ...] = ()
    slices: tuple[tuple[int, ...], ...] = ()
    loans: tuple[Loan, ...] = ()
    contexts: tuple[Context, ...] = ()

    @property
    def num_segments(self) -> int:
        """Length of the chain of segments."""
        return len(self.segment_names)

    def rank_of(self, segment: int, micro_batch: int) -> int:
        """The rank that runs ``segment`` of ``micro_batch``."""
        return self.placement[segment][micro_batch]

    def owner_of(self, segment: int) -> int:
        """The rank that has the weights of ``segment``, from which others may borrow them."""
        return self._lenders.get(segment, self.placement[segment][0])

    @cached_property
    def _lenders(self) -> dict[int, int]:
        """The owner of each segment whose weights are lent."""
        return {loan.segment: loan.owner for loan in reversed(self.loans)}

    def losses_of(self, rank: int) -> tuple[int, ...]:
        """The micro batches whose losses a rank computes, in order."""
        return tuple(i for i, home in enumerate(self.placement[-1]) if home == rank)

    def reported_by(self, rank: int) -> tuple[int, ...]:
        """The micro batches whose losses a rank reports, in the order of their losses.

        Of slices, the sequences whose last slice's loss is there: a loss function wants all of a sequence.
        """
        last = self.num_segments - 1
        own = [op.micro_batch for op in self.orders[rank] if op.segment == last and op.kind is Kind.F]
        if not self.slices:
            return tuple(own)
        return tuple(number for number, group in enumerate(self.slices) if group[-1] in own)

    def read_by(self, rank: int) -> tuple[int, ...]:
        """The micro batches whose tokens or labels a rank needs, in order; of slices, their sequences."""
        ends = zip(self.placement[0], self.placement[-1], strict=True)
        own = [i for i, homes in enumerate(ends) if rank in homes]
        sequences = {i: number for number, group in enumerate(self.slices) for i in group}
        return tuple(dict.fromkeys(sequences.get(i, i) for i in own))

    @property
    def num_sequences(self) -> int:
        """Micro batches of data: those of the plan, or the sequences that they are slices of."""
        return len(self.slices) or self.num_microbatches

    def receive_of(self, result: Operation) -> Operation:
        """The receive that brings ``result``, a forward or backward on another rank, to its neighbour."""
        _, receive, edge = message_of(result)
        return Operation(edge, receive, result.micro_batch, self.rank_of(result.segment, result.micro_batch))

    def cost_name(self, segment: int, micro_batch: int) -> str:
        """What the cost of one micro batch in one segment is filed under: ``SEGMENT[/MICRO BATCH]``."""
        name = self.segment_names[segment]
        return f"{name}/{self.micro_batch_names[micro_batch]}" if self.micro_batch_names else name

    def context_cost_name(self, micro_batch: int) -> str:
        """What the message of a micro batch's keys and values is filed under."""
        return f"context/{self.micro_batch_names[micro_batch]}" if self.micro_batch_names else "context"

    @cached_property
    def context_index(self) -> ContextIndex:
        """The messages of contexts by the computations at their ends."""
        return ContextIndex(self.contexts, has_backward=self.has_backward)

    @cached_property
    def computations(self) -> Computations:
        """Its computations by number."""
        return Computations.of(self.orders, self.placement, self.segment_names, self.micro_batch_names)

    @cached_property
    def wiring(self) -> Wiring:
        """What its computations wait for and give rise to."""
        return Wiring(
            self.computations, self.orders, self.loans, self.context_index, is_lowered=self.is_lowered
        )

    @cached_property
    def borrowing(self) -> list[tuple[Numbers, Numbers]]:
        """Of every rank, the places in ``loans`` that it takes, 1, and ends, -1, in its order."""
        return borrowing(self.computations, self.loans)

    @cached_property
    def cost_names(self) -> tuple[str, ...]:
        """Every name that :meth:`cost_name` can return, in order of segments."""
        kinds = dict.fromkeys(self.micro_batch_names)
        segments = dict.fromkeys(self.segment_names)
        return tuple(f"{name}/{kind}" for name in segments for kind in kinds) if kinds else tuple(segments)

    @cached_property
    def is_lowered(self) -> bool:
        """True if the plan holds its messages; always true where nothing crosses ranks."""
        if any(not op.kind.is_compute for order in self.orders for op in order):
            return True
        return not (self.loans or self.contexts) and all(
            here == there
            for segment in range(self.num_segments - 1)
            for here, there in zip(self.placement[segment], self.placement[segment + 1], strict=True)
        )

    @cached_property
    def has_backward(self) -> bool:
        """False for evaluation plans."""
        return any(op.kind in (Kind.B, Kind.W) for order in self.orders for op in order)

    @cached_property
    def split_micro_batches(self) -> frozenset[int]:
        """The micro batches whose weight gradients are operations of their own: W in every segment.

        B of any other micro batch is its whole backward pass.
        """
        return frozenset(op.micro_batch for order in self.orders for op in order if op.kind is Kind.W)

    @property
    def splits_backward(self) -> bool:
        """True if weight gradients of at least one micro batch are operations of their own."""
        return bool(self.split_micro_batches)

    def last_kind(self, micro_batch: int) -> Kind:
        """What completes a segment's weight gradients for one micro batch."""
        return Kind.W if micro_batch in self.split_micro_batches else Kind.B

    def completing(self, loan: Loan) -> set[Operation]:
        """The operations after which the gradients of a loan's weights are complete."""
        return {Operation(loan.segment, self.last_kind(i), i) for i in loan.micro_batches}

    def compute_only(self) -> Plan:
        """The same plan without its messages."""
        return self.with_orders(tuple(op for op in order if op.kind.is_compute) for order in self.orders)

    def forward_only(self) -> Plan:
        """The forward half of the plan, for evaluation: same placement, same order."""
        kept = (Kind.F, Kind.SEND_F, Kind.RECV_F, Kind.SEND_P, Kind.RECV_P, Kind.SEND_K, Kind.RECV_K)
        return self.with_orders(tuple(op for op in order if op.kind in kept) for order in self.orders)

    def with_orders(self, orders: Iterable[Iterable[Operation]]) -> Plan:
        """A copy with other orders."""
        return replace(self, orders=tuple(tuple(order) for order in orders))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the JSON form: ranks compare it before their first message."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The whole plan as JSON, one line per rank and per segment; read back by :meth:`from_json`."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "schedule": self.schedule,
            "num_ranks": self.num_ranks,
            "num_microbatches": self.num_microbatches,
            "parameters": dict(self.parameters),
            "segments": list(self.segment_names),
        }
        if self.micro_batch_names:
            head["micro_batches"] = list(self.micro_batch_names)
        if self.slices:
            head["slices"] = [list(group) for group in self.slices]
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        if self.loans:
            lines.append(json_rows("loans", [loan._asdict() for loan in self.loans]))
        if self.contexts:
            lines.append(json_rows("contexts", [context._asdict() for context in self.contexts]))
        lines.append(json_rows("placement", [_compact(row) for row in self.placement]))
        lines.append(json_rows("orders", [[str(op) for op in order] for order in self.orders]))
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; ``ValueError`` names the field that is wrong. Does not validate the schedule."""
        data = parse_object(text, "not a plan")
        if data.get("format") != FORMAT:
            raise ValueError(f'not a plan: "format" must be "{FORMAT}"')
        if data.get("version") != VERSION:
            raise ValueError(f"plan version {data.get('version')!r}; this program reads {VERSION}")
        num_microbatches = _field(data, "num_microbatches", int)
        if num_microbatches > len(text):
            # Each micro batch has operations: the text is too short, and expanding would exhaust memory.
            raise ValueError(f'not a plan: "num_microbatches" is {num_microbatches}, more than are planned')
        return cls(
            schedule=_field(data, "schedule", str),
            num_ranks=_field(data, "num_ranks", int),
            num_microbatches=num_microbatches,
            segment_names=tuple(_strings(_field(data, "segments", list), "segments")),
            placement=tuple(_expand(row, num_microbatches) for row in _field(data, "placement", list)),
            orders=tuple(
                tuple(Operation.parse(word) for word in _strings(order, "orders"))
                for order in _field(data, "orders", list)
            ),
            parameters=_field(data, "parameters", dict),
            micro_batch_names=tuple(_strings(data.get("micro_batches", []), "micro_batches")),
            slices=_slices(data.get("slices", [])),
            loans=tuple(_loan(entry) for entry in _optional_list(data, "loans")),
            contexts=tuple(_context(entry) for entry in _optional_list(data, "contexts")),
        )

    def to_csv(self) -> str:
        """The orders alone: one row per rank, operations in execution order."""
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([str(op) for op in order] for order in self.orders)
        return stream.getvalue()


def orders_from_csv(text: str) -> tuple[Order, ...]:
    """Read the orders written by :meth:`Plan.to_csv`."""
    return tuple(tuple(Operation.parse(word) for word in row) for row in csv.reader(io.StringIO(text)))


def _compact(row: tuple[int, ...]) -> int | list[int]:
    """One number for a segment that every micro batch meets on the same rank."""
    return row[0] if len(set(row)) == 1 else list(row)


def _expand(row: object, num_microbatches: int) -> tuple[int, ...]:
    if type(row) is int:
        return (row,) * num_microbatches
    if isinstance(row, list) and all(type(rank) is int for rank in row):
        return tuple(row)
    raise ValueError(f'not a plan: "placement" holds {row!r} instead of a rank or a list of ranks')


def _slices(groups: object) -> tuple[tuple[int, ...], ...]:
    if isinstance(groups, list) and all(
        isinstance(group, list) and all(type(i) is int for i in group) for group in groups
    ):
        return tuple(tuple(group) for group in groups)
    raise ValueError('not a plan: "slices" must hold lists of micro batches')


def _loan(entry: object) -> Loan:
    if isinstance(entry, dict) and set(entry) == set(Loan._fields):
        segment, owner, borrower, micro_batches = (entry[name] for name in Loan._fields)
        if isinstance(micro_batches, list) and all(
            type(i) is int for i in (segment, owner, borrower, *micro_batches)
        ):
            return Loan(segment, owner, borrower, tuple(micro_batches))
    raise ValueError(
        f'not a plan: "loans" holds {entry!r:.60} instead of numbers for {", ".join(Loan._fields)}'
    )


def _context(entry: object) -> Context:
    if isinstance(entry, dict) and set(entry) == set(Context._fields):
        segment, owner, borrower, lent, readers, is_resent = (entry[name] for name in Context._fields)
        if (
            isinstance(lent, list)
            and isinstance(readers, list)
            and all(type(i) is int for i in (segment, owner, borrower, *lent, *readers))
            and isinstance(is_resent, bool)
        ):
            return Context(segment, owner, borrower, tuple(lent), tuple(readers), is_resent)
    raise ValueError(
        f'not a plan: "contexts" holds {entry!r:.60} instead of values for {", ".join(Context._fields)}'
    )


def _optional_list(data: Mapping[str, Any], key: str) -> list[Any]:
    return _field(data, key, list) if key in data else []


def _field(data: Mapping[str, Any], key: str, kind: type) -> Any:
    value = data.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f'not a plan: "{key}" must be of type {kind.__name__}, found {value!r:.60}')
    return value


def _strings(values: object, key: str) -> list[str]:
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return values
    raise ValueError(f'not a plan: "{key}" must hold lists of strings')
