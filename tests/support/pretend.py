"""Stand on any rank of any layout in this process, to build models that then do not communicate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from megatron.core import parallel_state
from models import Case, initialize
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def pretend_rank(case: Case, rank: int = 0) -> Iterator[None]:
    """Megatron's groups as ``rank`` of the case's world sees them.

    Collectives return at once and leave their results undefined, so shapes are right and, where a group has
    more than one rank, values are not.
    """
    dist.init_process_group("fake", rank=rank, world_size=case.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(case.tp, case.pp, create_gloo_process_groups=False)
        initialize(case)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
