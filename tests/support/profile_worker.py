"""What each rank does in the tests of profiling."""

from __future__ import annotations

import torch.distributed as dist

from helixpipe.elastic.costs.fit import Measurement
from helixpipe.plan.cost_model import Pieces, Workload
from helixpipe.profiling import profile, profile_chunks
from helixpipe.profiling.profile import prepare


def profile_here(workload: Workload) -> Pieces:
    """A short profile in the process group that the test has built."""
    prepare(workload, dist.get_world_size())
    return profile(workload, repeats=1, alive=2)


def profile_chunks_here(workload: Workload, max_seq_length: int) -> tuple[Pieces, tuple[Measurement, ...]]:
    """A short profile of chunks in the process group that the test has built."""
    prepare(workload, dist.get_world_size())
    return profile_chunks(workload, max_seq_length, repeats=1)
