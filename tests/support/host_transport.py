"""Megatron's own pipeline messages between ranks that share a GPU: gloo carries host memory only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_isend, _irecv = dist.isend, dist.irecv


def install() -> None:
    """Let ``isend`` and ``irecv`` take tensors of a GPU over gloo; needs ``batch_p2p_comm`` off."""
    dist.isend, dist.irecv = _send, _receive


def _send(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _isend(tensor.cpu(), *args, **kwargs)


def _receive(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    staged = torch.empty(tensor.shape, dtype=tensor.dtype)
    return _Receive(_irecv(staged, *args, **kwargs), staged, tensor)


class _Receive:
    def __init__(self, work: Any, staged: Tensor, tensor: Tensor) -> None:
        self.work, self.staged, self.tensor = work, staged, tensor

    def wait(self) -> None:
        self.work.wait()
        self.tensor.copy_(self.staged)
