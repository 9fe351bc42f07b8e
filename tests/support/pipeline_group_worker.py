"""What each rank does in the tests of groups and connections."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from communicator_worker import everyone_to_everyone
from megatron.core import parallel_state

from helixpipe.megatron_adapter.pipeline_group import make_communicator
from helixpipe.plan import ScheduleRequest, build_plan
from helixpipe.runtime.communicator import TorchCommunicator
from helixpipe.runtime.connections import Connections, NotConnected


def talk_in_two_ways(tp: int, pp: int) -> tuple[int, int, int]:
    """Make Megatron's groups, then ours; rank and size there, and how many groups the process has by then."""
    parallel_state.initialize_model_parallel(tp, pp)
    num_groups = len(dist.distributed_c10d._world.pg_names)
    communicator = make_communicator(parallel_state.get_pipeline_model_parallel_group(), has_two_ways=True)
    assert communicator._upward is not communicator._downward
    everyone_to_everyone(communicator)
    return communicator.rank, communicator.size, num_groups


def connect_unless_absent(absent: int | None, timeout_s: float) -> str | None:
    """Connect the ranks of a plan between all pairs; what a rank complains about."""
    plan = build_plan("helix", ScheduleRequest(num_layers=4, num_ranks=4, num_microbatches=8))
    communicator = TorchCommunicator(dist.group.WORLD)
    if communicator.rank == absent:
        return None
    try:
        Connections(communicator, torch.device("cpu"), timeout_s).open_for(plan)
    except NotConnected as error:
        return str(error)
    return None


class OptionsOfTorch26(SimpleNamespace):
    """``ProcessGroupNCCL.Options`` as torch 2.6 to 2.13 have it."""

    def __init__(self) -> None:
        super().__init__(
            is_high_priority_stream=False,
            config=SimpleNamespace(max_ctas=-2147483648),
            _timeout=timedelta(minutes=10),
        )
