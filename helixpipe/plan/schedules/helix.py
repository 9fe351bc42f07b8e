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
"""

from __future__ import annotations

from collections.abc import Iterator

from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.request import ScheduleRequest, require_multiple

DEFAULT_FOLD = 2
DEFAULT_ATTENTION_RANGE = "core"


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only helix plan (attention parallel partition, folded first-in-last-out order)."""
    p, num_layers, m = request.num_ranks, request.num_layers, request.num_microbatches
    fold = request.num_fold or DEFAULT_FOLD
    require_multiple(num_layers, p, "the number of layers", "the pipeline-parallel size")
    require_multiple(m, p * fold, "the number of micro batches", "pipeline-parallel size x fold")

    num_segments = 2 * num_layers + 1
    attention_range = request.attention_range or DEFAULT_ATTENTION_RANGE
    is_spread = request.head_placement == "spread"

    def rank_of(segment: int, micro_batch: int) -> int:
        layer, is_attention = divmod(segment, 2)
        slot = micro_batch // fold % p
        if layer == num_layers and is_spread:
            return (layer + slot) % p
        return (layer + slot + 1) % p if is_attention else layer % p

    lent = list(range(1, num_segments, 2)) if attention_range != "core" else []
    if is_spread:
        lent.append(num_segments - 1)
    return Plan(
        schedule="helix",
        num_ranks=p,
        num_microbatches=m,
        segment_names=tuple(_name(segment, num_segments) for segment in range(num_segments)),
        placement=tuple(tuple(rank_of(segment, i) for i in range(m)) for segment in range(num_segments)),
        orders=tuple(tuple(_order(rank, p, num_layers, m, fold, is_spread)) for rank in range(p)),
        parameters={
            "num_layers": num_layers,
            "num_fold": fold,
            "attention_range": attention_range,
            **({"head_placement": "spread"} if is_spread else {}),
        },
        loans=tuple(
            Loan(segment, segment // 2 % p, rank_of(segment, first), tuple(range(first, first + fold)))
            for segment in lent
            for first in range(0, m, fold)
            # In one of p slots, the weights are used where they are.
            if rank_of(segment, first) != segment // 2 % p
        ),
    )


def _name(segment: int, num_segments: int) -> str:
    if segment % 2:
        return "attention"
    return {0: "first", num_segments - 1: "last"}.get(segment, "middle")


def _order(rank: int, p: int, num_layers: int, m: int, fold: int, is_spread: bool) -> Iterator[Operation]:
    """Rounds of ``p * fold`` micro batches, one after the other: forward, then its exact reverse."""
    slots = list(_forward_slots(rank, p, num_layers))
    if is_spread:
        slots = [(segment, slot) for segment, slot in slots if segment < 2 * num_layers]
        slots.append((2 * num_layers, rank))
    for first in range(0, m, p * fold):
        forward = [
            (segment, first + slot * fold + member) for segment, slot in slots for member in range(fold)
        ]
        yield from (Operation(segment, Kind.F, i) for segment, i in forward)
        yield from (Operation(segment, Kind.B, i) for segment, i in reversed(forward))


def _forward_slots(rank: int, p: int, num_layers: int) -> Iterator[tuple[int, int]]:
    """(segment, slot) in the forward order of one rank."""
    # Warm-up: attention for the layers whose other segments run on the ranks before this one.
    for k in range(rank - 1, -1, -1):
        yield 2 * (rank - 1 - k) + 1, k
    for layer in range(rank, num_layers + 1, p):
        for slot in range(p):
            yield 2 * layer, slot
        for k in range(min(p, num_layers - layer)):
            yield 2 * (layer + k) + 1, p - 1 - k
