"""The pipeline ranks as a group: what they must agree on, and how messages travel between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from helixpipe.plan import Plan
from helixpipe.runtime.communicator import Communicator, TorchCommunicator
from helixpipe.runtime.staging import HostStagedCommunicator


def agree_on_plan(plan: Plan, size: tuple[Any, ...], dtype: torch.dtype, group: dist.ProcessGroup) -> None:
    """Compare plan and message sizes over the pipeline ranks before the first message.

    Raises:
        ValueError: on every rank if one differs; gloo would deliver garbage without an error.
    """
    names = (
        "plan", "dtype", "micro batches", "sequence length", "micro batch size", "forward only",
        "elements over all edges",
    )  # fmt: skip
    agree(dict(zip(names, (plan.fingerprint[:16], str(dtype), *size), strict=True)), group)


def agree(mine: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Compare values by name over the ranks of a group.

    Raises:
        ValueError: on every rank if one differs.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, tuple(mine.values()), group=group)
    if len(set(everyone)) > 1:
        shown = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(everyone))
        raise ValueError(
            f"pipeline ranks disagree on ({', '.join(mine)}): {shown}. Start every rank with the same "
            "arguments"
        )


def make_communicator(group: dist.ProcessGroup) -> Communicator:
    """Messages between the pipeline ranks of ``group``."""
    if dist.get_backend(group) == "nccl":
        ranks = dist.get_process_group_ranks(group)
        reverse = dist.new_group(ranks, backend="nccl", use_local_synchronization=True)
        return TorchCommunicator(group, reverse)
    communicator = TorchCommunicator(group)
    return HostStagedCommunicator(communicator) if torch.cuda.is_available() else communicator
