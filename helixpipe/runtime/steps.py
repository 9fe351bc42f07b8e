"""Steps: what each operation of an order does, bound once to all that it needs when its turn comes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge

from helixpipe.gradient_edges import edge_of
from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Operation
from helixpipe.runtime.context_lending import ContextLending
from helixpipe.runtime.lending import WeightLending
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.store import ActivationStore
from helixpipe.runtime.trace import Trace
from helixpipe.runtime.transfers import Receive, Slot, Source, Tensors
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

Step: TypeAlias = Callable[[], None]
BackwardContext: TypeAlias = Callable[[Operation], AbstractContextManager[object]]


class Segments(Protocol):
    """What a plan's segments compute.

    Attributes:
        weight_gradients: in a plan with W, the backward pass of :meth:`forward` adds to it what W is to do.
            Whatever is not added belongs to B, and a plan without W leaves nothing there.
        lending: the weights on loan, with which :meth:`forward` computes where there are any; None for
            segments whose plans have no loans.
        contexts: keys and values that :meth:`forward` of attention reads beside its inputs; None for
            segments whose plans have no slices on several ranks.
    """

    weight_gradients: DeferredWeightGradients
    lending: WeightLending | None
    contexts: ContextLending | None

    def forward(self, segment: int, micro_batch: int, inputs: Tensors) -> Tensors:
        """Run a segment; the last one returns a single scalar, the loss to differentiate."""

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        """Layout of what segment ``edge`` returns to segment ``edge + 1`` of a micro batch."""


class Saved(NamedTuple):
    """What a forward keeps: its input leaves, and where the gradients of its outputs enter the graph.

    Edges stand for the outputs, whose data may be freed once they are sent; None for an output that needs
    no gradient.
    """

    inputs: Tensors
    outputs: tuple[GradientEdge | None, ...]


class Forward:
    """F: runs a segment and keeps what its backward starts from.

    Args:
        operation: this F.
        segments: the computation.
        source: of its input; None for the first segment.
        result: where its output goes; None for the last segment.
        store: keeps what the backward needs; None in an evaluation.
        layout: of its input, see :attr:`MessageLayout.num_kept`; None for the first segment.
        device: where tensors are.
        trace: times it.
    """

    def __init__(
        self,
        operation: Operation,
        segments: Segments,
        source: Source | None,
        result: Slot | None,
        store: ActivationStore[Saved] | None,
        layout: MessageLayout | None,
        device: torch.device,
        trace: Trace,
    ) -> None:
        self.operation = operation
        self.segments = segments
        self.source = source
        self.result = result
        self.store = store
        self.trace = trace
        self._key = (operation.segment, operation.micro_batch)
        self._stand_ins: Tensors = ()
        if layout is not None and layout.num_kept is not None and store is not None:
            # Not a number, so that nobody reads them unnoticed.
            nothing = torch.full((), torch.nan, dtype=layout.dtype, device=device)
            self._stand_ins = tuple(nothing.expand(shape) for shape in layout.shapes[layout.num_kept :])

    def __call__(self) -> None:
        """Run it."""
        differentiate = self.store is not None
        inputs: Tensors = ()
        if self.source is not None:
            inputs = tuple(t.detach().requires_grad_(differentiate) for t in self.source.take())
        self.trace.begin(self.operation)
        outputs = self.segments.forward(*self._key, inputs)
        self.trace.end()
        if self.store is not None:
            self.store.put(self._key, Saved(inputs, tuple(map(edge_of, outputs))))
        if self.result is not None:
            self.result.put(tuple(output.detach() for output in outputs))
        if self._stand_ins:
            # The leaf stays, for its gradient; the data that only the forward reads goes.
            for leaf, stand_in in zip(inputs[-len(self._stand_ins) :], self._stand_ins, strict=True):
                leaf.data = stand_in


class Backward:
    """B: the input gradient of a segment, or the whole backward pass if its micro batch has no W.

    Args:
        operation: this B.
        source: of its output's gradients; None for the last segment.
        result: where its input's gradients go; None for the first segment.
        store: holds what the forward has kept.
        device: where tensors are.
        trace: times it.
        around: is entered while it runs.
        queue: takes what is left to W; None if nothing is.
    """

    def __init__(
        self,
        operation: Operation,
        source: Source | None,
        result: Slot | None,
        store: ActivationStore[Saved],
        device: torch.device,
        trace: Trace,
        around: BackwardContext,
        queue: DeferredWeightGradients | None,
    ) -> None:
        self.operation = operation
        self.source = source
        self.result = result
        self.store = store
        self.trace = trace
        self.around = around
        self.queue = queue
        self._key = (operation.segment, operation.micro_batch)
        # The loss is a scalar and starts the backward pass with a gradient of one.
        self._one: Tensors = () if source is not None else (torch.ones((), device=device),)

    def __call__(self) -> None:
        """Run it."""
        grads = self._one if self.source is None else self.source.take()
        saved = self.store.take(self._key)
        needed = [(e, g) for e, g in zip(saved.outputs, grads, strict=True) if e is not None]
        self.trace.begin(self.operation)
        with self.around(self.operation), self._collecting():
            if needed:
                edges, grads = zip(*needed, strict=True)
                _differentiate(edges, grads)
        self.trace.end()
        if self.result is not None:
            self.result.put(
                tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in saved.inputs)
            )

    def _collecting(self) -> AbstractContextManager[None]:
        return _NOTHING if self.queue is None else self.queue.collect(self._key)


class WeightGradient:
    """W: what B has left.

    Args:
        operation: this W.
        queue: what is left.
        trace: times it.
        around: is entered while it runs.
    """

    def __init__(
        self,
        operation: Operation,
        queue: DeferredWeightGradients,
        trace: Trace,
        around: BackwardContext,
    ) -> None:
        self.operation = operation
        self.queue = queue
        self.trace = trace
        self.around = around

    def __call__(self) -> None:
        """Run it."""
        self.trace.begin(self.operation)
        with self.around(self.operation):
            self.queue.run((self.operation.segment, self.operation.micro_batch))
        self.trace.end()


class Borrowing:
    """A forward whose weights come in with it, or are let go after it: the first or last of a loan.

    Args:
        forward: what computes with them.
        lending: this rank's loans.
        loan: which weights.
        weights: brings them; None if they are here already.
        forgets: True in an evaluation, which returns no gradients.
    """

    def __init__(
        self, forward: Step, lending: WeightLending, loan: Loan, weights: Receive | None, *, forgets: bool
    ) -> None:
        self.forward = forward
        self.lending = lending
        self.loan = loan
        self.weights = weights
        self.forgets = forgets

    def __call__(self) -> None:
        """Run it."""
        if self.weights is not None:
            self.lending.borrow(self.loan, self.weights.take())
        self.forward()
        if self.forgets:
            self.lending.forget(self.loan)


def _differentiate(edges: tuple[GradientEdge, ...], grads: Tensors) -> None:
    """``torch.autograd.backward``, of which more is spent on looking at its arguments than on a small graph.

    Megatron calls the engine in the same way; the engine itself compares the shapes.
    """
    Variable._execution_engine.run_backward(
        edges, grads, False, False, (), allow_unreachable=True, accumulate_grad=True
    )


_NOTHING = nullcontext()


def no_context(operation: Operation) -> AbstractContextManager[object]:
    """Around a backward for which there is nothing to arrange."""
    return _NOTHING
