"""Messages of a GPU's tensors over a transport that carries the host's only.

gloo sends and receives in host memory. Several ranks that share one GPU, which NCCL refuses, talk through it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helixpipe.runtime.communicator import Communicator, Handle


class HostStagedCommunicator:
    """Copies every message through a buffer on the host.

    A send waits until the device has written the message; a receive is copied to the device on the current
    stream when it is waited for, so that what follows on that stream sees it.

    Args:
        inner: carries tensors of the host.
    """

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner
        self.rank = inner.rank
        self.size = inner.size

    def send(self, buffer: Tensor, peer: int, tag: int) -> Handle:
        """See :class:`helixpipe.runtime.communicator.Communicator`."""
        staged = _host_buffer(buffer)
        staged.copy_(buffer)
        return _StagedSend(self.inner.send(staged, peer, tag), staged)

    def receive(self, buffer: Tensor, peer: int, tag: int) -> Handle:
        """See :class:`helixpipe.runtime.communicator.Communicator`."""
        staged = _host_buffer(buffer)
        return _StagedReceive(self.inner.receive(staged, peer, tag), staged, buffer)


def _host_buffer(buffer: Tensor) -> Tensor:
    # Pinned memory lets the device copy without the host's help.
    return torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=buffer.is_cuda)


class _StagedSend:
    def __init__(self, handle: Handle, staged: Tensor) -> None:
        self.handle = handle
        self.staged: Tensor | None = staged  # must live until the message is gone

    def wait(self) -> None:
        self.handle.wait()
        self.staged = None

    def is_completed(self) -> bool:
        return self.handle.is_completed()


class _StagedReceive:
    def __init__(self, handle: Handle, staged: Tensor, buffer: Tensor) -> None:
        self.handle, self.staged, self.buffer = handle, staged, buffer

    def wait(self) -> None:
        self.handle.wait()
        # On the current stream; the staged buffer outlives it in this handle or in the pinned allocator.
        self.buffer.copy_(self.staged, non_blocking=True)

    def is_completed(self) -> bool:
        return False  # it is copied to the device by whoever waits for it
