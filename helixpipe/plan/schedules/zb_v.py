"""ZB-V: no bubble while F, B and W last equally long, in the memory of 1F1B.

Qi et al., Zero Bubble Pipeline Parallelism (arXiv 2401.10241), and V-ZB of Pipeline Parallelism with
Controllable Memory (arXiv 2405.15362).
"""

from __future__ import annotations

from collections.abc import Iterator

from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.request import ScheduleRequest
from helixpipe.plan.schedules.v_shape import passes_in_turn, v_plan


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only ZB-V plan; every rank holds at most 2p chunks, as much as rank 0 of 1F1B."""
    p, m = request.num_ranks, request.num_microbatches
    return v_plan("zb-v", request, (passes_in_turn(_passes(rank, p, m), rank, p, m) for rank in range(p)))


def _passes(rank: int, p: int, m: int) -> Iterator[str]:
    """Every rank is busy from its first pass to its last; it starts and ends ``rank`` slots after rank 0."""
    m = max(m, 2 * p - 1)  # fewer micro batches leave gaps in the order for a full pipeline
    below = p - rank  # ranks that the first chunk has still to pass, this one included
    # Forwards until the first micro batch has come back, then until rank 0 could start its backward.
    yield from ["F0"] * (2 * below - 1)
    yield from ["F1", "F0"] * rank
    # The second chunk's backward goes down the ranks; nothing has come back for the first chunk yet.
    yield from ["F1", "B1", "W1"] * below
    # Steady: both chunks in turn, until there are no more micro batches to take in.
    yield from ["F0", "B0", "W0", "F1", "B1", "W1"] * (m - 2 * p + rank + 1)
    yield from ["B0", "W0", "F1", "B1", "W1"] * (below - 1)
    # The ranks above wait for these backwards; weight gradients are put off and fill the end.
    yield from ["B0", "B1"] * rank
    yield from ["B0", "W0"] * below
    yield from ["W1"] * rank
    yield from ["W0"] * rank
