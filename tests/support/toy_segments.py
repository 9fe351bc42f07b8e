"""A chain of small segments with weights, and the same computation as one autograd graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helixpipe.plan.plan import Plan
from helixpipe.runtime.communicator import Communicator, InMemoryFabric
from helixpipe.runtime.executor import Executor
from helixpipe.runtime.lending import WeightLending
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.trace import HostClock, Trace
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

ROWS = 3
TIMEOUT_S = 10.0


class DeferringProduct(torch.autograd.Function):
    """``hidden @ weight``, whose weight gradient is left to a queue; autograd does not see the weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: tuple[Tensor], queue: DeferredWeightGradients) -> Tensor:
        ctx.save_for_backward(hidden)
        (ctx.weight,), ctx.queue = weight, queue
        return hidden @ ctx.weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (hidden,), weight = ctx.saved_tensors, ctx.weight
        ctx.queue.add(lambda: torch.autograd.backward(weight, hidden.t() @ grad))
        return grad @ weight.t(), None, None


class ToySegments:
    """Segments that hand on a hidden state, whose width differs by edge, and a residual.

    Every third segment passes its residual on untouched, as attention does; no backward pass needs a
    residual's data. Any segment's weight can be lent.

    Args:
        num_segments: length of the chain.
        deaf: segments that do not use the residual they are given.
        frozen: segments that return a residual which needs no gradient.
    """

    def __init__(
        self, num_segments: int, *, deaf: Collection[int] = (), frozen: Collection[int] = ()
    ) -> None:
        self.num_segments = num_segments
        self.deaf, self.frozen = deaf, frozen
        self.weight_gradients = DeferredWeightGradients()
        self.lending = WeightLending(
            lambda segment: [self.weights[segment]],
            lambda segment: [self.weights[segment].shape],
            torch.float64,
            torch.float64,
        )
        self.contexts = None
        generator = torch.Generator().manual_seed(num_segments)
        self.weights = [
            torch.randn(
                self._width(s - 1), self._width(s), dtype=torch.float64, generator=generator
            ).requires_grad_()
            for s in range(num_segments)
        ]
        self.losses: dict[int, float] = {}

    @staticmethod
    def _width(edge: int) -> int:
        return 4 + edge % 3

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        shapes = (torch.Size((ROWS, self._width(edge))), torch.Size((ROWS,)))
        return MessageLayout(shapes, torch.float64, num_kept=1)

    def _multiply(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden @ weight

    def forward(self, segment: int, micro_batch: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if segment == 0:
            generator = torch.Generator().manual_seed(micro_batch)
            hidden = torch.randn(ROWS, self._width(-1), dtype=torch.float64, generator=generator)
            residual = hidden.sum(dim=1)
        else:
            hidden, residual = inputs
        (weight,) = self.lending.weights_for(segment, micro_batch) or (self.weights[segment],)
        hidden = torch.tanh(self._multiply(hidden, weight))
        if segment in self.deaf:
            residual = hidden.sum(dim=1)
        elif segment in self.frozen:
            residual = torch.full((ROWS,), 0.5, dtype=torch.float64)
        elif segment % 3 != 1:
            residual = residual * 0.9 + hidden.mean(dim=1)
        if segment < self.num_segments - 1:
            return hidden, residual
        loss = hidden.sum() * residual.sum()
        self.losses[micro_batch] = loss.item()
        return (loss,)


class SplitToySegments(ToySegments):
    """The same, with weight gradients that are left for W."""

    def _multiply(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return hidden @ weight
        if not hidden.requires_grad:  # the data that segment 0 starts from
            hidden.requires_grad_()
        return DeferringProduct.apply(hidden, (weight,), self.weight_gradients)


class Run(NamedTuple):
    """What became of an iteration, over all ranks."""

    losses: dict[int, float]
    gradients: list[Tensor]


Segmented = Callable[[], ToySegments]


def run_whole(make: Segmented, num_microbatches: int) -> Run:
    """The computation without any plan: one graph per micro batch."""
    segments = make()
    for micro_batch in range(num_microbatches):
        values: tuple[Tensor, ...] = ()
        for segment in range(segments.num_segments):
            values = segments.forward(segment, micro_batch, values)
        values[0].backward()
    return collect([segments])


def collect(ranks: list[ToySegments]) -> Run:
    """Losses of all ranks, and gradients summed over them: each rank has weights of its own."""
    losses: dict[int, float] = {}
    for segments in ranks:
        losses.update(segments.losses)
    gradients = []
    for copies in zip(*(segments.weights for segments in ranks), strict=True):
        total = torch.zeros_like(copies[0])
        for weight in copies:
            if weight.grad is not None:
                total += weight.grad
        gradients.append(total)
    return Run(losses, gradients)


def make_executor(
    plan: Plan,
    segments: ToySegments,
    communicator: Communicator,
    kind: type[Executor] = Executor,
    **options: object,
) -> Executor:
    # Where the transport has a device, what the host does is work of that device.
    options.setdefault("record_event", getattr(communicator, "record_event", None))
    return kind(plan, segments, communicator, device=torch.device("cpu"), trace=Trace(HostClock()), **options)


class RendezvousFabric(InMemoryFabric):
    """A send ends only when its receive has been posted, as with the strictest of transports."""

    def __init__(self, size: int) -> None:
        super().__init__(size, TIMEOUT_S)
        self._posted: set[tuple[int, int, int]] = set()
        self._changed = threading.Condition()

    def communicator(self, rank: int) -> RendezvousCommunicator:
        return RendezvousCommunicator(self, rank)

    def post(self, key: tuple[int, int, int]) -> None:
        with self._changed:
            self._posted.add(key)
            self._changed.notify_all()

    def wait_for_receiver(self, key: tuple[int, int, int]) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._posted, self.timeout_s):
                raise TimeoutError(f"(sender, receiver, tag) {key}: no receive was posted")


class RendezvousCommunicator:
    def __init__(self, fabric: RendezvousFabric, rank: int) -> None:
        self.fabric, self.rank, self.size = fabric, rank, fabric.size
        self._inner = InMemoryFabric.communicator(fabric, rank)

    def send(self, buffer: Tensor, peer: int, tag: int) -> RendezvousSend:
        self._inner.send(buffer, peer, tag)
        return RendezvousSend(self.fabric, (self.rank, peer, tag))

    def receive(self, buffer: Tensor, peer: int, tag: int) -> object:
        self.fabric.post((peer, self.rank, tag))
        return self._inner.receive(buffer, peer, tag)


class RendezvousSend:
    def __init__(self, fabric: RendezvousFabric, key: tuple[int, int, int]) -> None:
        self.fabric, self.key = fabric, key

    def wait(self) -> None:
        self.fabric.wait_for_receiver(self.key)

    def is_completed(self) -> bool:
        return False
