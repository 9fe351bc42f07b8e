"""Sliced helix: helix whose slots hold slices of one sequence.

The ``p * fold`` slices of a sequence sit in the slots of a round in causal order: slice = slot * fold +
member. Attention of p slots runs on p ranks at once, as in :mod:`helixpipe.plan.schedules.helix`. A slice
attends to the keys and values of all earlier ones. The rank that makes them lends them straight to the rank
that reads them, once for all members of two slots, and their gradients return there. Sequences follow one
another.

With the attention range ``core``, keys and values are made in segment ``2l`` on rank ``l mod p``, where the
last slot attends. With ``qkv`` and ``block`` the attention of layer l is two segments on one rank, ``3l+1``
with norm1 and QKV and ``3l+2`` with the rest: keys and values of all members of a slot leave before the first
attends.

The last segment and its backward follow each other slice by slice: no more than one slice's logits exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from helixpipe.plan.context import Context
from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Parameter, Plan
from helixpipe.plan.schedules.helix import DEFAULT_ATTENTION_RANGE, DEFAULT_FOLD, forward_slots
from helixpipe.plan.schedules.request import ScheduleRequest


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only plan; its micro batches are slices: slice j of sequence i is ``i * p * fold + j``."""
    p, fold = request.num_ranks, request.num_fold or DEFAULT_FOLD
    # Slices are micro batches: checks their number, too.
    sliced = replace(request, num_microbatches=request.num_microbatches * p * fold)
    attention_range = request.attention_range or DEFAULT_ATTENTION_RANGE
    grid = _Grid(
        p=p,
        num_layers=request.num_layers,
        fold=fold,
        num_sequences=request.num_microbatches,
        attention_range=attention_range,
        is_spread=request.head_placement == "spread",
    )
    parameters: dict[str, Parameter] = {
        "num_layers": request.num_layers,
        "num_fold": fold,
        "attention_range": attention_range,
    }
    if grid.is_spread:
        parameters["head_placement"] = "spread"
    if request.resend_context:
        parameters["resend_context"] = True
    return Plan(
        schedule="sliced-helix",
        num_ranks=p,
        num_microbatches=sliced.num_microbatches,
        segment_names=grid.segment_names,
        placement=tuple(
            tuple(grid.rank_of(segment, i // fold % p) for i in range(sliced.num_microbatches))
            for segment in range(grid.last + 1)
        ),
        orders=tuple(tuple(grid.order(rank)) for rank in range(p)),
        parameters=parameters,
        micro_batch_names=tuple(f"slice{i % (p * fold)}" for i in range(sliced.num_microbatches)),
        slices=tuple(
            tuple(range(first, first + p * fold)) for first in range(0, sliced.num_microbatches, p * fold)
        ),
        loans=tuple(grid.loans()),
        contexts=tuple(grid.contexts(is_resent=bool(request.resend_context))),
    )


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Where the segments of every slot run.

    Attributes:
        p: ranks, and slots of a round.
        num_layers: L.
        fold: slices of a slot.
        num_sequences: rounds.
        attention_range: pieces on the attention rank; with weights, QKV has a segment of its own.
        is_spread: the last segment of a slot runs where its last attention has run.
    """

    p: int
    num_layers: int
    fold: int
    num_sequences: int
    attention_range: str
    is_spread: bool

    @property
    def per_layer(self) -> int:
        """Segments of a layer."""
        return 2 if self.attention_range == "core" else 3

    @property
    def last(self) -> int:
        """The segment with the head."""
        return self.per_layer * self.num_layers

    @property
    def segment_names(self) -> tuple[str, ...]:
        attention = ("attention",) if self.per_layer == 2 else ("qkv", "attention")
        middle = (*attention, "middle") * (self.num_layers - 1)
        return ("first", *middle, *attention, "last")

    def owner_of(self, segment: int) -> int:
        """The rank with the weights of a segment; the head's are with the embedding's."""
        return 0 if segment == self.last else segment // self.per_layer % self.p

    def rank_of(self, segment: int, slot: int) -> int:
        """The rank that runs a segment of a slot."""
        layer, piece = divmod(segment, self.per_layer)
        if segment == self.last and self.is_spread:
            return (layer + slot) % self.p
        return (layer + slot + 1) % self.p if piece else self.owner_of(segment)

    def members(self, sequence: int, slot: int) -> tuple[int, ...]:
        """The slices of a slot."""
        first = (sequence * self.p + slot) * self.fold
        return tuple(range(first, first + self.fold))

    def order(self, rank: int) -> Iterator[Operation]:
        """Sequences one after the other: forward, the ends slice by slice, and the reverse of the forward."""
        for sequence in range(self.num_sequences):
            forward = list(self._forward(rank, sequence))
            yield from (Operation(segment, Kind.F, i) for segment, i in forward)
            for slot in range(self.p):
                if self.rank_of(self.last, slot) == rank:
                    for i in self.members(sequence, slot):
                        yield Operation(self.last, Kind.F, i)
                        yield Operation(self.last, Kind.B, i)
            yield from (Operation(segment, Kind.B, i) for segment, i in reversed(forward))

    def _forward(self, rank: int, sequence: int) -> Iterator[tuple[int, int]]:
        """(segment, slice) in the forward order of a rank, without the last segment."""
        for number, slot in forward_slots(rank, self.p, self.num_layers):
            layer, is_attention = divmod(number, 2)
            if layer == self.num_layers:
                continue
            first = self.per_layer * layer
            for segment in range(first + 1, first + self.per_layer) if is_attention else (first,):
                yield from ((segment, i) for i in self.members(sequence, slot))

    def loans(self) -> Iterator[Loan]:
        """Weights of segments that do not run where these are; for a sequence's slots one after the other."""
        pieces = {"core": (), "qkv": (1,), "block": (1, 2)}[self.attention_range]
        lent = [segment for segment in range(self.last) if segment % self.per_layer in pieces]
        for segment in [*lent, self.last] if self.is_spread else lent:
            owner = self.owner_of(segment)
            for sequence in range(self.num_sequences):
                for slot in range(self.p):
                    borrower = self.rank_of(segment, slot)
                    if borrower != owner:
                        yield Loan(segment, owner, borrower, self.members(sequence, slot))

    def contexts(self, *, is_resent: bool) -> Iterator[Context]:
        """From the slot that makes keys and values to every later one that is not on that rank."""
        for sequence in range(self.num_sequences):
            for segment in range(self.per_layer - 1, self.last, self.per_layer):
                for slot in range(self.p):
                    owner = self.rank_of(segment - 1, slot)
                    for later in range(slot + 1, self.p):
                        borrower = self.rank_of(segment, later)
                        if borrower != owner:
                            members = self.members(sequence, slot), self.members(sequence, later)
                            yield Context(segment, owner, borrower, *members, is_resent)
