"""Helix: attention of p micro batches on p ranks at once, first in, last out (HelixPipe, PPoPP 2026).

Every layer is cut around its attention. Segment ``2l`` is what lies between the attention of layer ``l-1``
and that of layer ``l``; it runs on rank ``l mod p``, where its weights are. Segment ``2l+1`` is the
attention of layer ``l``; for the micro batches in slot ``j`` it runs on rank ``(l + j + 1) mod p``, so the
attention of p slots proceeds on p ranks at the same time and never lengthens the pipeline's start.

With the attention ranges ``qkv`` and ``block`` that segment has weights: those of norm1 and QKV, and in the
block those of the projection. They belong to rank ``l mod p`` as all weights before the layer's attention do,
and are lent to the ranks of the other p-1 slots. Norm1 goes with QKV: left behind, it would send its output
beside the residual, two hidden states instead of one, and keep its input besides.

The last segment, with the head and the loss, runs on rank 0 for every slot, as in the paper, while the other
ranks wait. Spread, it runs where the slot's last attention has just run, on p ranks at once, with its weights
lent by rank 0.

A round is p slots of ``fold`` micro batches. Rounds follow one another, first in last out (``filo``), or are
``interlocked``, see :mod:`helixpipe.plan.schedules.interlocked`. The first round takes in the micro batches
that no other has room for, spread over its slots. Layers are dealt to the ranks in turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Order, Parameter, Plan
from helixpipe.plan.schedules.interlocked import Seat, interlocked_orders, listed_orders
from helixpipe.plan.schedules.request import ScheduleRequest
from helixpipe.plan.segment_names import segment_name

DEFAULT_FOLD = 2
DEFAULT_ATTENTION_RANGE = "core"


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only helix plan: attention parallel partition, rounds in the order that is asked for."""
    fold = request.num_fold or DEFAULT_FOLD
    _check(request, fold)
    seats = _seats(request.num_microbatches, request.num_ranks, fold)
    placed = _placed(request, fold, seats)
    splits = bool(request.split_weight_gradients)
    orders: Sequence[Order]
    if request.round_order != "interlocked":
        orders = [
            tuple(_filo_order(rank, request.num_ranks, request.num_layers, seats, _is_spread(request)))
            for rank in range(request.num_ranks)
        ]
    elif request.costs is None:
        orders = interlocked_orders(placed, seats, splits_backward=splits)
    else:
        orders = listed_orders(placed, seats, request.costs, splits_backward=splits)
    return placed.with_orders(orders)


def _check(request: ScheduleRequest, fold: int) -> None:
    p, num_layers, m = request.num_ranks, request.num_layers, request.num_microbatches
    if num_layers < p:
        raise ValueError(
            f"helix gives every rank a layer: the number of layers ({num_layers}) must be at least the "
            f"pipeline-parallel size ({p}); use at most that many ranks"
        )
    if m < p:
        raise ValueError(
            f"helix fills a slot for every rank: the number of micro batches ({m}) must be at least the "
            f"pipeline-parallel size ({p}); use {p}, fewer ranks, or sliced-helix, which fills slots with "
            "slices of sequences"
        )
    if request.round_order != "interlocked":
        for flag, value in (
            ("--split-weight-gradients", request.split_weight_gradients),
            ("--costs", request.costs),
        ):
            if value:
                raise ValueError(f"{flag} needs --round-order interlocked; add that, or remove {flag}")


def _is_spread(request: ScheduleRequest) -> bool:
    return request.head_placement == "spread"


def _seats(m: int, p: int, fold: int) -> list[Seat]:
    """Rounds of ``p * fold`` micro batches; the first takes in what is left over, spread over its slots."""
    num_rounds = max(1, m // (p * fold))
    first = m - (num_rounds - 1) * p * fold
    seats: list[Seat] = []
    for number in range(num_rounds):
        size = p * fold if number else first
        # Rounded up: of half a round too much, every second slot has one more.
        begins = [-(-slot * size // p) for slot in range(p + 1)]
        for slot, (begin, end) in enumerate(pairwise(begins)):
            seats += (Seat(number, slot, member) for member in range(end - begin))
    return seats


def _placed(request: ScheduleRequest, fold: int, seats: Sequence[Seat]) -> Plan:
    """Placement and loans, without orders."""
    p, num_layers = request.num_ranks, request.num_layers
    num_segments = 2 * num_layers + 1
    attention_range = request.attention_range or DEFAULT_ATTENTION_RANGE

    def owner_of(segment: int) -> int:
        # The head is with the embedding, whose weights it may share.
        return 0 if segment == 2 * num_layers else segment // 2 % p

    def rank_of(segment: int, slot: int) -> int:
        if segment == 2 * num_layers and _is_spread(request):
            return (num_layers + slot) % p
        return (segment // 2 + slot + 1) % p if segment % 2 else owner_of(segment)

    lent = list(range(1, num_segments, 2)) if attention_range != "core" else []
    if _is_spread(request):
        lent.append(num_segments - 1)
    slots: dict[tuple[int, int], list[int]] = defaultdict(list)
    for micro_batch, seat in enumerate(seats):
        slots[seat.round, seat.slot].append(micro_batch)
    return Plan(
        schedule="helix",
        num_ranks=p,
        num_microbatches=len(seats),
        segment_names=tuple(_names(num_layers, request.layer_kinds or ("",) * num_layers)),
        placement=tuple(
            tuple(rank_of(segment, seat.slot) for seat in seats) for segment in range(num_segments)
        ),
        orders=((),) * p,
        parameters=_parameters(request, fold, attention_range),
        loans=tuple(
            Loan(segment, owner_of(segment), rank_of(segment, slot), tuple(micro_batches))
            for segment in lent
            for (_, slot), micro_batches in slots.items()
            # In one of p slots, the weights are used where they are.
            if rank_of(segment, slot) != owner_of(segment)
        ),
    )


def _parameters(request: ScheduleRequest, fold: int, attention_range: str) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {
        "num_layers": request.num_layers,
        "num_fold": fold,
        "attention_range": attention_range,
    }
    if _is_spread(request):
        parameters["head_placement"] = "spread"
    if request.round_order == "interlocked":
        parameters["round_order"] = "interlocked"
    if request.split_weight_gradients:
        parameters["split_weight_gradients"] = True
    return parameters


def _names(num_layers: int, kinds: Sequence[str]) -> Iterator[str]:
    yield segment_name("first", kinds[0])
    for layer in range(num_layers):
        yield segment_name("attention", kinds[layer])
        if layer + 1 < num_layers:
            yield segment_name("middle", kinds[layer], kinds[layer + 1])
    yield segment_name("last", kinds[-1])


def _filo_order(
    rank: int, p: int, num_layers: int, seats: Sequence[Seat], is_spread: bool
) -> Iterator[Operation]:
    """Rounds one after the other: forward, then its exact reverse."""
    last = 2 * num_layers
    slots = [(segment, slot) for segment, slot in forward_slots(rank, p, num_layers) if segment < last]
    if is_spread:
        slots += ((last, slot) for slot in range(p) if (num_layers + slot) % p == rank)
    elif rank == 0:
        slots += ((last, slot) for slot in range(p))
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for micro_batch, seat in enumerate(seats):
        members[seat.round, seat.slot].append(micro_batch)
    for number in range(seats[-1].round + 1):
        forward = [(segment, i) for segment, slot in slots for i in members[number, slot]]
        yield from (Operation(segment, Kind.F, i) for segment, i in forward)
        yield from (Operation(segment, Kind.B, i) for segment, i in reversed(forward))


def forward_slots(rank: int, p: int, num_layers: int) -> Iterator[tuple[int, int]]:
    """(segment, slot) in the forward order of one rank; the last segment follows the last layer's rank."""
    # Warm-up: attention for the layers whose other segments run on the ranks before this one.
    for layer in range(min(rank, num_layers)):
        yield 2 * layer + 1, rank - 1 - layer
    for layer in range(rank, num_layers + 1, p):
        for slot in range(p):
            yield 2 * layer, slot
        for k in range(min(p, num_layers - layer)):
            yield 2 * (layer + k) + 1, p - 1 - k
