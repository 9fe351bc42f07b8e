"""What V-shaped schedules share: two chunks per rank, down the ranks with one and back up with the other.

Rank r holds stages r and 2p-1-r, so the last rank hands its result to itself and rank 0 has both ends of
the model. A pass is named by its kind and chunk: ``F0`` is the forward of chunk 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.request import ScheduleRequest, stage_plan

_PASSES = ("F0", "F1", "B1", "B0", "W1", "W0")


def v_plan(name: str, request: ScheduleRequest, orders: Iterable[Iterable[Operation]]) -> Plan:
    """A plan of 2p stages, stage ``s`` and ``2p-1-s`` on one rank."""
    down = range(request.num_ranks)
    return stage_plan(name, request, orders, stage_ranks=(*down, *reversed(down)))


def pass_of(name: str, rank: int, num_ranks: int, micro_batch: int) -> Operation:
    """The operation that a pass like ``B1`` is on ``rank``."""
    return Operation(2 * num_ranks - 1 - rank if name[1] == "1" else rank, Kind(name[0]), micro_batch)


def passes_in_turn(names: Iterable[str], rank: int, num_ranks: int, m: int) -> Iterator[Operation]:
    """Operations of a sequence of pass names, in which every pass takes its micro batches in turn.

    Micro batches from ``m`` on are left out: an order for more of them is one for m.
    """
    count = dict.fromkeys(_PASSES, 0)
    for name in names:
        if count[name] < m:
            yield pass_of(name, rank, num_ranks, count[name])
        count[name] += 1


class Block(NamedTuple):
    """A building block: when the passes of one micro batch start, in slots that last as long as one pass.

    It is repeated every six slots, one for each pass, so the passes of a rank may never start at the same
    instant modulo 6. How long it spans decides how many activations are held (arXiv 2405.15362).

    Attributes:
        offsets: slots from one rank to the next in F0, F1, B1 and B0.
        gaps: slots from F0 to F1 on the last rank, from F1 to B1 on the first, from B1 to B0 on the last.
    """

    offsets: tuple[int, int, int, int]
    gaps: tuple[int, int, int]

    def starts(self, rank: int, num_ranks: int) -> dict[str, int]:
        """Start slot of each pass of micro batch 0; each W in the next slot that is free after its B."""
        hops, back = num_ranks - 1, num_ranks - 1 - rank
        turns = [0]
        for offset, gap in zip(self.offsets, self.gaps, strict=False):
            turns.append(turns[-1] + offset * hops + gap)
        ranks_passed = (rank, back, rank, back)
        starts = {
            name: turn + offset * passed
            for name, turn, offset, passed in zip(_PASSES, turns, self.offsets, ranks_passed, strict=False)
        }
        for chunk in "10":
            taken = {start % 6 for start in starts.values()}
            slot = starts["B" + chunk] + 1
            while slot % 6 in taken:
                slot += 1
            starts["W" + chunk] = slot
        assert len({start % 6 for start in starts.values()}) == 6, "passes of the block collide"
        return starts


def repeat(block: Block, request: ScheduleRequest) -> Iterator[list[Operation]]:
    """The order of each rank when the block starts anew every six slots; empty slots vanish."""
    p, m = request.num_ranks, request.num_microbatches
    for rank in range(p):
        starts = block.starts(rank, p)
        timed = sorted((start + 6 * i, name, i) for name, start in starts.items() for i in range(m))
        yield [pass_of(name, rank, p, i) for _, name, i in timed]
