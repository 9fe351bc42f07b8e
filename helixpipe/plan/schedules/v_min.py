"""V-Min: a third of the activations of 1F1B on every rank.

Qi et al. 2024, Pipeline Parallelism with Controllable Memory (arXiv 2405.15362).
"""

from __future__ import annotations

from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.request import ScheduleRequest
from helixpipe.plan.schedules.v_shape import Block, repeat, v_plan

_OFFSETS = (1, 1, 1, 1)


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only V-Min plan.

    Offsets of 1 let a micro batch pass through without a stop, the shortest life that activations can have:
    4p slots on rank 0, so about 2p/3 chunks are held, a third of 1F1B's 2p. Slots assume that F, B and W
    last equally long; where they do not, every round trip waits, in the steady state too.
    """
    # With p a multiple of 3, the turn on rank 0 would put B1 of some ranks on the slot of another pass.
    gaps = (1, 3, 1) if request.num_ranks % 3 == 0 else (1, 1, 1)
    return v_plan("v-min", request, repeat(Block(_OFFSETS, gaps), request))
