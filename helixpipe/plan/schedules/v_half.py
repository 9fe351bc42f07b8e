"""V-Half: half the activations of 1F1B on every rank.

Qi et al. 2024, Pipeline Parallelism with Controllable Memory (arXiv 2405.15362).
"""

from __future__ import annotations

from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.request import ScheduleRequest
from helixpipe.plan.schedules.v_shape import Block, repeat, v_plan

_OFFSETS = (2, 1, 2, 1)
# By the parity of p: of the gaps without collisions, those with which a rank holds least.
_GAPS = ((5, 1, 4), (2, 1, 1))


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only V-Half plan.

    Offsets that add up to 6 make the block of rank 0 span 6p slots, so about p chunks, half of 1F1B's 2p, are
    held. Slots assume that F, B and W last equally long; where they do not, ranks wait for each other.
    """
    return v_plan("v-half", request, repeat(Block(_OFFSETS, _GAPS[request.num_ranks % 2]), request))
