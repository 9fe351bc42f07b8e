"""Which GPU a rank uses, and to meet there."""

from __future__ import annotations

import os
import platform

import torch
import torch.distributed as dist


def take_gpu() -> None:
    """Make this rank's GPU the current one; where a host has fewer GPUs than ranks, ranks share them.

    NCCL refuses two ranks on one GPU of one host. Ranks that share have a host's name of their own each, and
    send over sockets, as between nodes: slow, and nothing that NCCL promises, but every schedule can be tried
    on one GPU. Call it before the first process group.
    """
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    torch.cuda.set_device(local_rank % count)
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > count:
        os.environ.setdefault("NCCL_HOSTID", f"{platform.node()}-{local_rank // count}")


def barrier() -> None:
    """Wait for all ranks of the job. Torch would guess the GPU to do it on from the rank's number."""
    on_gpu = dist.get_backend() == "nccl"
    dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)
