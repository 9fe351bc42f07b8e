"""DualPipeV: one forward and one backward of opposite chunks side by side, on a V.

DeepSeek-AI 2025: DualPipe (DeepSeek-V3 technical report, section 3.2.1) cut in half, with one copy of the
weights. The forward and the backward of a pair are independent, so communication inside one can hide behind
the other. Here operations follow one another: a pair is two neighbours, and a backward that is not split is
B, then its W.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.request import ScheduleRequest
from helixpipe.plan.schedules.v_shape import passes_in_turn, v_plan


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only DualPipeV plan; every rank holds at most 2p + 1 chunks."""
    p, m = request.num_ranks, request.num_microbatches
    return v_plan(
        "dualpipe-v", request, (passes_in_turn(_passes(rank, p, m), rank, p, m) for rank in range(p))
    )


def _passes(rank: int, p: int, m: int) -> Iterator[str]:
    """The eight steps."""
    m = max(m, 2 * p)  # fewer micro batches leave gaps in the order for a full pipeline
    below = p - rank - 1  # ranks that the first chunk has still to pass
    put_off: deque[str] = deque()
    whole = {"0": ("B0", "W0"), "1": ("B1", "W1")}

    def split(chunk: str) -> str:
        put_off.append("W" + chunk)
        return "B" + chunk

    # 1, 2: forwards until the first micro batch has come back, then both chunks.
    yield from ["F0"] * (2 * below)
    yield from ["F0", "F1"] * (rank + 1)
    # 3: the first backwards, split so that the next rank has its input sooner.
    for _ in range(below):
        yield from (split("1"), put_off.popleft(), "F1")
    # 4, 5: pairs of a forward and a backward, until there are no more micro batches to take in.
    yield from ("F0", *whole["1"], "F1", *whole["0"]) * (m - 2 * p + rank + 1)
    yield from (*whole["1"], "F1", *whole["0"]) * below
    # 6: backwards alone; weight gradients of the second half are put off.
    backwards = "10" * (rank + 1)
    for index, chunk in enumerate(backwards):
        yield from whole[chunk] if index < len(backwards) // 2 else (split(chunk),)
    # 7, 8: weight gradients, first between the backwards that still arrive, then alone.
    for _ in range(below):
        yield from (put_off.popleft(), split("0"))
    yield from put_off
