"""What buffers of messages add to a plan's memory."""

from __future__ import annotations

from helixpipe.plan.lower import lower
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.costs import Costs
from helixpipe.plan.simulation.message_buffers import peak_with_buffers


def peak_with_messages(plan: Plan, costs: Costs, gpus_per_rank: int) -> int:
    """Peak bytes of a GPU on the worst rank, unfinished sends and posted receives included.

    Args:
        plan: without messages.
        costs: what segments keep on one GPU, and what a message of all GPUs of a rank has.
        gpus_per_rank: GPUs that share the messages of a pipeline rank.
    """
    lowered = lower(plan, costs)
    return max(peak_with_buffers(lowered, costs, rank, gpus_per_rank) for rank in range(plan.num_ranks))
