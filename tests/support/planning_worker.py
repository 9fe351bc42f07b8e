"""What each rank does in the tests of shared planning."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from planning import LENGTHS, make_job

from helixpipe.elastic import plan_batch
from helixpipe.elastic.service.background import BackgroundPlanner, PlannedBatch
from helixpipe.runtime.shared_planner import SharedPlanner
from megatron.pretrain.data.elastic_batches import make_shared_planner


def plan_together() -> dict[str, Any]:
    """Several batches over all ranks, whose jobs differ in the solver's gap as clocks make solvers differ."""
    rank = dist.get_rank()
    job = make_job(2.0, gap=(0.0, 0.5)[rank])
    made: list[BackgroundPlanner] = []

    def make(job: Any) -> BackgroundPlanner:
        made.append(BackgroundPlanner(job, patience_s=20))
        return made[0]

    def next_plan(lengths: tuple[int, ...]) -> PlannedBatch:
        planner.submit(lengths)
        return planner.result()

    planner = SharedPlanner(make, job, dist.group.WORLD)
    good = next_plan(LENGTHS)
    if made:
        os.kill(made[0]._process._popen.pid, signal.SIGKILL)  # type: ignore[union-attr]
    killed = next_plan(LENGTHS)
    again = next_plan(LENGTHS[:5])
    try:
        next_plan((10**9,))
    except ValueError as error:
        refused = str(error)
    planner.close()
    return {
        "in replicas": [_plan_in_replicas(size) for size in (1, 2)],
        "planners": len(made),
        "alone": plan_batch(LENGTHS, job).fingerprint,
        "together": [found.plan.fingerprint for found in (good, killed, again)],
        "fallbacks": [found.fallback for found in (good, killed, again)],
        "refused": refused,
    }


def _plan_in_replicas(pipeline_parallel: int) -> str:
    """What a replica of so many ranks plans for its own batch."""
    parallel_state.initialize_model_parallel(1, pipeline_parallel)
    planner = make_shared_planner(make_job())
    planner.submit(LENGTHS[parallel_state.get_data_parallel_rank() :])
    fingerprint = planner.result().plan.fingerprint
    planner.close()
    parallel_state.destroy_model_parallel()
    return fingerprint
