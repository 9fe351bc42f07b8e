"""What each rank does in the tests of profiling."""

from __future__ import annotations

import torch.distributed as dist

from helixpipe.plan.cost_model import Pieces, Workload
from helixpipe.profiling import profile
from helixpipe.profiling.profile import prepare


def profile_here(workload: Workload) -> Pieces:
    """A short profile in the process group that the test has built."""
    prepare(workload, dist.get_world_size())
    return profile(workload, repeats=1, alive=2)
