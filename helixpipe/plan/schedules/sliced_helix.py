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

Slots may as well hold chunks of several sequences, see :mod:`helixpipe.elastic.round_schedule`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from typing import TypeAlias

from helixpipe.plan.context import Context
from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Parameter, Plan
from helixpipe.plan.schedules.helix import DEFAULT_ATTENTION_RANGE, DEFAULT_FOLD, forward_slots
from helixpipe.plan.schedules.request import ScheduleRequest

Slot: TypeAlias = tuple[int, ...]
Round: TypeAlias = tuple[Slot, ...]


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only plan; its micro batches are slices: slice j of sequence i is ``i * p * fold + j``."""
    p, fold = request.num_ranks, request.num_fold or DEFAULT_FOLD
    per_sequence = p * fold
    # Slices are micro batches: checks their number, too.
    count = replace(request, num_microbatches=request.num_microbatches * per_sequence).num_microbatches
    sequences = [range(first, first + per_sequence) for first in range(0, count, per_sequence)]
    attention_range = request.attention_range or DEFAULT_ATTENTION_RANGE
    is_spread = request.head_placement == "spread"
    parameters: dict[str, Parameter] = {
        "num_layers": request.num_layers,
        "num_fold": fold,
        "attention_range": attention_range,
    }
    if is_spread:
        parameters["head_placement"] = "spread"
    if request.resend_context:
        parameters["resend_context"] = True
    rounds = SlicedRounds(
        p=p,
        num_layers=request.num_layers,
        rounds=tuple(tuple(tuple(own[slot * fold :][:fold]) for slot in range(p)) for own in sequences),
        slices=tuple(map(tuple, sequences)),
        attention_range=attention_range,
        is_spread=is_spread,
    )
    return rounds.plan(
        "sliced-helix",
        parameters,
        tuple(f"slice{i % per_sequence}" for i in range(count)),
        resends_context=bool(request.resend_context),
    )


@dataclass(frozen=True, kw_only=True)
class SlicedRounds:
    """Rounds whose slots hold slices of sequences, and where the segments of every slot run.

    Attributes:
        p: ranks, and slots of a round.
        num_layers: L.
        rounds: the micro batches of every slot of every round. They are numbered in this order, which is that
            of the slices of every sequence, and a sequence stays within its round. A slot may be empty.
        slices: the micro batches of each cut sequence, see :class:`Plan`.
        attention_range: pieces on the attention rank; with weights, QKV has a segment of its own.
        is_spread: the last segment of a slot runs where its last attention has run.
    """

    p: int
    num_layers: int
    rounds: tuple[Round, ...]
    slices: tuple[tuple[int, ...], ...]
    attention_range: str
    is_spread: bool

    def plan(
        self,
        schedule: str,
        parameters: Mapping[str, Parameter],
        names: tuple[str, ...],
        *,
        resends_context: bool = False,
    ) -> Plan:
        """The compute-only plan.

        Args:
            schedule: its name.
            parameters: of the plan.
            names: of the micro batches.
            resends_context: keys and values are lent again for the backward pass.
        """
        slots = [slot for own in self.rounds for slot, members in enumerate(own) for _ in members]
        return Plan(
            schedule=schedule,
            num_ranks=self.p,
            num_microbatches=len(slots),
            segment_names=self.segment_names,
            placement=tuple(
                tuple(self.rank_of(segment, slot) for slot in slots) for segment in range(self.last + 1)
            ),
            orders=tuple(tuple(self.order(rank)) for rank in range(self.p)),
            parameters=parameters,
            micro_batch_names=names,
            slices=self.slices,
            loans=tuple(self.loans()),
            contexts=tuple(self.contexts(is_resent=resends_context)),
        )

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
        """In the order of the chain."""
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

    def order(self, rank: int) -> Iterator[Operation]:
        """Rounds one after the other: forward, the ends slice by slice, and the reverse of the forward."""
        for own in self.rounds:
            forward = list(self._forward(rank, own))
            yield from (Operation(segment, Kind.F, i) for segment, i in forward)
            for slot, members in enumerate(own):
                if self.rank_of(self.last, slot) == rank:
                    for i in members:
                        yield Operation(self.last, Kind.F, i)
                        yield Operation(self.last, Kind.B, i)
            yield from (Operation(segment, Kind.B, i) for segment, i in reversed(forward))

    def _forward(self, rank: int, own: Round) -> Iterator[tuple[int, int]]:
        """(segment, slice) in the forward order of a rank, without the last segment."""
        for number, slot in forward_slots(rank, self.p, self.num_layers):
            layer, is_attention = divmod(number, 2)
            if layer == self.num_layers:
                continue
            first = self.per_layer * layer
            for segment in range(first + 1, first + self.per_layer) if is_attention else (first,):
                yield from ((segment, i) for i in own[slot])

    def loans(self) -> Iterator[Loan]:
        """Weights of segments that do not run where these are; for a round's slots one after the other."""
        pieces = {"core": (), "qkv": (1,), "block": (1, 2)}[self.attention_range]
        lent = [segment for segment in range(self.last) if segment % self.per_layer in pieces]
        for segment in [*lent, self.last] if self.is_spread else lent:
            owner = self.owner_of(segment)
            for own in self.rounds:
                for slot, members in enumerate(own):
                    borrower = self.rank_of(segment, slot)
                    if borrower != owner and members:
                        yield Loan(segment, owner, borrower, members)

    def contexts(self, *, is_resent: bool) -> Iterator[Context]:
        """From the slot that makes keys and values to every later one that is not on that rank."""
        for own in self.rounds:
            lendings = list(self._lendings(own))
            for segment in range(self.per_layer - 1, self.last, self.per_layer):
                for (slot, lent), (later, readers) in lendings:
                    owner, borrower = self.rank_of(segment - 1, slot), self.rank_of(segment, later)
                    if borrower != owner:
                        yield Context(segment, owner, borrower, lent, readers, is_resent)

    def _lendings(self, own: Round) -> Iterator[tuple[tuple[int, Slot], tuple[int, Slot]]]:
        """Every two slots, with the micro batches of each, that hold slices of the same sequence."""
        slot_of = {i: slot for slot, members in enumerate(own) for i in members}
        for group in self.slices:
            if group[0] in slot_of:
                held = [(slot, tuple(same)) for slot, same in groupby(group, slot_of.__getitem__)]
                yield from combinations(held, 2)
