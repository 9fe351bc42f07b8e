"""Sums of weights and optimizer states, to find a bit that changed between memory and memory.

The hash of a file is taken of what was written. A bit that flips before, in the copy in host memory, or
after, while parts are put together, leaves every number finite and every hash right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from helixpipe.megatron_adapter.schedule import device

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor's bit patterns as integers, modulo 2^64: a scalar on its device.

    It depends neither on the order of elements nor on how they are spread over ranks. One flipped bit always
    changes it.
    """
    bits = as_integers(tensor)
    if bits.device.type == "cpu":
        # Eight times as fast as torch, which converts every element first.
        return torch.tensor(bits.numpy().sum(dtype=np.int64))
    return bits.sum(dtype=torch.int64)


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bit patterns; unlike numbers, NaN equals itself, and zero differs from its negative."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


def global_sums(state: Mapping[str, Any]) -> dict[str, int]:
    """The sum of every tensor in a sharded state, over the ranks that hold parts of it; collective.

    The same for every layout, on every rank.
    """
    names, sums = [], []
    for value in nested_values(state):
        for tensor in nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]:
            if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id):
                assert tensor.data is not None, "what is saved has data"
                names.append(tensor.key)
                sums.append(bit_sum(tensor.data).to(device()))
    # One wait for the device.
    mine = Counter[str]()
    for name, value in zip(names, torch.stack(sums).tolist() if sums else [], strict=True):
        mine[name] += value
    everyone: list[Any] = [None] * dist.get_world_size()
    is_first = dist.get_rank() == 0
    dist.gather_object(dict(mine), everyone if is_first else None, dst=0)
    total = Counter[str]()
    for part in everyone if is_first else []:
        total.update(part)
    outcome = [{name: value % 2**64 for name, value in total.items()}]
    dist.broadcast_object_list(outcome, src=0)
    return outcome[0]


def differing(saved: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """The tensors whose sums are not what they were, in the order of their names."""
    return sorted(name for name in saved.keys() | found.keys() if saved.get(name) != found.get(name))
