"""The executor: runs one rank's operations in the plan's order, and decides nothing itself."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Kind, Operation, input_of
from helixpipe.plan.plan import Plan
from helixpipe.reliability.record import NoProgress, Progress
from helixpipe.runtime.communicator import Communicator, Handle
from helixpipe.runtime.header import HeaderCheck
from helixpipe.runtime.lending import WeightLending
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.store import ActivationStore
from helixpipe.runtime.trace import Trace
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

Tensors = tuple[Tensor, ...]


class Segments(Protocol):
    """What a plan's segments compute.

    Attributes:
        weight_gradients: in a plan with W, the backward pass of :meth:`forward` adds to it what W is to do.
            Whatever is not added belongs to B, and a plan without W leaves nothing there.
        lending: the weights on loan, with which :meth:`forward` computes where there are any; None for
            segments whose plans have no loans.
    """

    weight_gradients: DeferredWeightGradients
    lending: WeightLending | None

    def forward(self, segment: int, micro_batch: int, inputs: Tensors) -> Tensors:
        """Run a segment; the last one returns a single scalar, the loss to differentiate."""

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        """Layout of what segment ``edge`` returns to segment ``edge + 1`` of a micro batch."""


class _Saved(NamedTuple):
    """What a forward keeps: its input leaves, and where the gradients of its outputs enter the graph.

    Edges stand for the outputs, whose data may be freed once they are sent; None for an output that needs
    no gradient.
    """

    inputs: Tensors
    outputs: tuple[GradientEdge | None, ...]


class _Rest(NamedTuple):
    """The part of a message that only the forward pass reads, like a residual that passes by attention."""

    layout: MessageLayout
    buffer: Tensor

    def is_part_of(self, tensors: Tensors) -> bool:
        """True if one of the tensors is a view of the message."""
        data = self.buffer.untyped_storage().data_ptr()
        return any(tensor.untyped_storage().data_ptr() == data for tensor in tensors)

    def drop(self) -> None:
        """Free it."""
        self.layout.drop_rest(self.buffer)


class _Result(NamedTuple):
    """What an operation hands on, and messages of which it is a part and which may shrink once it is gone."""

    tensors: Tensors
    rests: tuple[_Rest, ...] = ()


class _Incoming(NamedTuple):
    handle: Handle
    buffer: Tensor


class _Outgoing(NamedTuple):
    operation: Operation
    handle: Handle
    buffer: Tensor


class Executor:
    """Runs a lowered plan on one rank, once per call of :meth:`run`.

    Args:
        plan: a validated, lowered plan.
        segments: the computation.
        communicator: this rank's end; its rank selects the order.
        device: where received tensors live.
        trace: records what was run.
        progress: told of every operation and wait as it begins, for whoever watches this rank.
        receive_ahead: how many compute operations before its consumer's turn a receive is posted at the
            latest, so that the message travels while others are computed. Each receive ahead holds a buffer.
        backward_context: entered around each B and W; lets the caller hold back gradient reduction.
    """

    # Sends complete in order per peer; beyond this many unfinished ones the oldest is waited for. A valid
    # plan cannot deadlock even if every send were waited for at once.
    MAX_UNFINISHED_SENDS = 16

    # Returned gradients are waited for and added when this many more have been asked for, or at the end: the
    # borrower may only just have sent them when their turn comes.
    MAX_UNADDED_GRADIENTS = 2

    # The direction of an edge, or of a loan, in the tag of a message.
    _DIRECTION: Mapping[str, int] = {"F": 0, "B": 1, "P": 2, "G": 3}

    def __init__(
        self,
        plan: Plan,
        segments: Segments,
        communicator: Communicator,
        *,
        device: torch.device,
        trace: Trace,
        progress: Progress | None = None,
        receive_ahead: int = 4,
        backward_context: Callable[[Operation], AbstractContextManager[object]] | None = None,
    ) -> None:
        assert plan.is_lowered
        assert plan.num_ranks == communicator.size
        self.plan = plan
        self.segments = segments
        self.communicator = communicator
        self.device = device
        self.trace = trace
        self.progress = progress or NoProgress()
        self.store: ActivationStore[_Saved] = ActivationStore()
        self._order = plan.orders[communicator.rank]
        self._layouts = {
            (op.segment, op.micro_batch): segments.layout(op.segment, op.micro_batch)
            for op in self._order
            if op.kind in (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B)
        }
        self._receives = [op for op in self._order if op.kind.is_receive]
        self._headers = HeaderCheck(int(plan.fingerprint[:15], 16), len(self._receives), device)
        self._posted_before = _posting_horizon(self._order, receive_ahead)
        self._backward_context = backward_context or (lambda operation: nullcontext())
        self._results: dict[Operation, _Result] = {}
        self._incoming: dict[Operation, _Incoming] = {}
        self._outgoing: deque[_Outgoing] = deque()
        self._returned: deque[Operation] = deque()
        assert not plan.loans or segments.lending is not None
        self._loans = {
            (loan.segment, micro_batch): loan
            for loan in plan.loans
            if loan.borrower == self.communicator.rank
            for micro_batch in loan.micro_batches
        }
        self._last_uses = {} if plan.has_backward else self._find_last_uses()
        self._dispatch: dict[Kind, Callable[[Operation], None]] = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.W: self._weight_gradient,
            Kind.SEND_F: self._send,
            Kind.SEND_B: self._send,
            Kind.RECV_F: self._receive,
            Kind.RECV_B: self._receive,
            Kind.SEND_P: self._lend,
            Kind.RECV_P: self._receive,
            Kind.SEND_G: self._give_back,
            Kind.RECV_G: self._receive_gradients,
        }

    def run(self) -> None:
        """Execute this rank's operations of one iteration.

        Raises:
            ValueError: a message is not the one that the plan expects, see :meth:`check_messages`.
        """
        posted = 0
        self.trace.start()
        for operation, horizon in zip(self._order, self._posted_before, strict=True):
            self.progress.begin(operation)
            for receive in self._receives[posted:horizon]:
                self._post(receive)
            posted = max(posted, horizon)
            self._dispatch[operation.kind](operation)
            self.trace.operations.append(operation)
        while self._outgoing:
            self._finish_send()
        while self._returned:
            self._take_back()
        self.trace.stop()
        self.progress.end()
        self.store.assert_empty()
        self.segments.weight_gradients.assert_empty()
        if self.segments.lending is not None:
            self.segments.lending.assert_empty()
        assert not self._results, f"results that nobody took: {list(self._results)}"
        assert not self._incoming, f"messages that nobody took: {list(self._incoming)}"

    def check_messages(self) -> None:
        """Where messages are not on the CPU, compare what has arrived, before its results are used.

        Raises:
            ValueError: a message was not the one that the plan expects.
        """
        self._headers.finish()

    def _forward(self, operation: Operation) -> None:
        self._take_weights(operation)
        inputs, rests = self._take_input(operation)
        differentiate = self.plan.has_backward
        with self.trace.compute(operation), torch.set_grad_enabled(differentiate):
            inputs = tuple(tensor.detach().requires_grad_(differentiate) for tensor in inputs)
            outputs = self.segments.forward(operation.segment, operation.micro_batch, inputs)
        if differentiate:
            edges = tuple(get_gradient_edge(output) if output.requires_grad else None for output in outputs)
            self.store.put((operation.segment, operation.micro_batch), _Saved(inputs, edges))
        passed_on = []
        for rest in rests:
            if rest.is_part_of(outputs):
                passed_on.append(rest)
            else:
                rest.drop()
        if operation.segment + 1 < self.plan.num_segments:
            result = _Result(tuple(output.detach() for output in outputs), tuple(passed_on))
            self._results[operation] = result
        if operation in self._last_uses:
            self._lending.forget(self._last_uses[operation])

    def _backward(self, operation: Operation) -> None:
        # The loss is a scalar and starts the backward pass with a gradient of one.
        grads = self._take_input(operation).tensors or (torch.ones((), device=self.device),)
        key = (operation.segment, operation.micro_batch)
        saved = self.store.take(key)
        splits = operation.micro_batch in self.plan.split_micro_batches
        split = self.segments.weight_gradients.collect(key) if splits else nullcontext()
        with self.trace.compute(operation), self._backward_context(operation), split:
            needed = [(e, g) for e, g in zip(saved.outputs, grads, strict=True) if e is not None]
            if needed:
                edges, grads = zip(*needed, strict=True)
                torch.autograd.backward(edges, grads)
        if operation.segment > 0:
            self._results[operation] = _Result(
                tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in saved.inputs)
            )

    def _weight_gradient(self, operation: Operation) -> None:
        with self.trace.compute(operation), self._backward_context(operation):
            self.segments.weight_gradients.run((operation.segment, operation.micro_batch))

    def _take_input(self, operation: Operation) -> _Result:
        """The neighbour's result: from this rank, or from a message that is waited for here."""
        producer = input_of(operation, self.plan.num_segments)
        if producer is None:
            return _Result(())
        if producer in self._results:
            return self._results.pop(producer)
        layout, buffer = self._wait(self.plan.receive_of(producer))
        shrinks = operation.kind is Kind.F and self.plan.has_backward and layout.num_kept is not None
        return _Result(layout.unpack(buffer), (_Rest(layout, buffer),) if shrinks else ())

    def _wait(self, message: Operation) -> tuple[MessageLayout, Tensor]:
        """A message that was posted, once it has arrived."""
        incoming = self._incoming.pop(message)
        self.progress.wait(message)
        with self.trace.wait(message):
            incoming.handle.wait()
        self.progress.resume()
        layout = self._layout(message)
        self._headers.compare(message, self._tag(message), layout, incoming.buffer)
        return layout, incoming.buffer

    def _wait_for_loan(self, message: Operation) -> Tensors:
        """Weights on loan, or their gradients."""
        layout, buffer = self._wait(message)
        return layout.unpack(buffer)

    def _layout(self, message: Operation) -> MessageLayout:
        if message.kind in (Kind.SEND_P, Kind.RECV_P):
            return self._lending.weight_layout(message.segment)
        if message.kind in (Kind.SEND_G, Kind.RECV_G):
            return self._lending.gradient_layout(message.segment)
        return self._layouts[message.segment, message.micro_batch]

    def _send(self, operation: Operation) -> None:
        forward = operation.kind is Kind.SEND_F
        producer = Operation(
            operation.segment if forward else operation.segment + 1,
            Kind.F if forward else Kind.B,
            operation.micro_batch,
        )
        result = self._results.pop(producer)
        self._post_send(operation, result.tensors)
        for rest in result.rests:
            rest.drop()

    def _post_send(self, operation: Operation, tensors: Tensors) -> None:
        assert operation.peer is not None
        layout, tag = self._layout(operation), self._tag(operation)
        buffer = layout.pack(tensors)
        self._headers.write(tag, layout, buffer)
        handle = self.communicator.send(buffer, operation.peer, tag)
        self._outgoing.append(_Outgoing(operation, handle, buffer))
        if len(self._outgoing) > self.MAX_UNFINISHED_SENDS:
            self._finish_send()

    def _finish_send(self) -> None:
        outgoing = self._outgoing.popleft()
        self.progress.wait(outgoing.operation)
        outgoing.handle.wait()
        self.progress.resume()

    def _receive(self, operation: Operation) -> None:
        assert operation in self._incoming, f"{operation} was not posted"

    def _post(self, operation: Operation) -> None:
        assert operation.peer is not None
        layout = self._layout(operation)
        buffer = layout.empty(self.device)
        self._headers.clear(layout, buffer)
        handle = self.communicator.receive(buffer, operation.peer, self._tag(operation))
        self._incoming[operation] = _Incoming(handle, buffer)

    def _tag(self, operation: Operation) -> int:
        """The same number at both ends of a message, and at no other message of the iteration."""
        number = operation.segment * self.plan.num_microbatches + operation.micro_batch
        return number * len(self._DIRECTION) + self._DIRECTION[operation.kind.value[-1]]

    @property
    def _lending(self) -> WeightLending:
        assert self.segments.lending is not None
        return self.segments.lending

    def _find_last_uses(self) -> dict[Operation, Loan]:
        """The forward after which an evaluation is done with a loan, which no message returns."""
        last: dict[Loan, Operation] = {}
        for operation in self._order:
            loan = self._loans.get((operation.segment, operation.micro_batch))
            if loan is not None and operation.kind is Kind.F:
                last[loan] = operation
        return {operation: loan for loan, operation in last.items()}

    def _take_weights(self, operation: Operation) -> None:
        """Before the first forward of a loan, wait for its weights."""
        loan = self._loans.get((operation.segment, operation.micro_batch))
        if loan is not None and loan.weights_received in self._incoming:
            self._lending.borrow(loan, self._wait_for_loan(loan.weights_received))

    def _lend(self, operation: Operation) -> None:
        self._post_send(operation, self._lending.lend(operation.segment))

    def _give_back(self, operation: Operation) -> None:
        loan = self._loans[operation.segment, operation.micro_batch]
        self._post_send(operation, self._lending.give_back(loan))

    def _receive_gradients(self, operation: Operation) -> None:
        self._receive(operation)
        self._returned.append(operation)
        if len(self._returned) > self.MAX_UNADDED_GRADIENTS:
            self._take_back()

    def _take_back(self) -> None:
        message = self._returned.popleft()
        self._lending.take_back(message.segment, self._wait_for_loan(message))


def _posting_horizon(order: tuple[Operation, ...], ahead: int) -> list[int]:
    """For each position of an order, how many of the order's receives are posted before it is executed.

    A receive is posted once no more than ``ahead`` compute operations stand before it.
    """
    receives = [index for index, op in enumerate(order) if op.kind.is_receive]
    computes = [index for index, op in enumerate(order) if op.kind.is_compute]
    horizons = []
    for index in range(len(order)):
        reached = bisect_right(computes, index - 1) + ahead
        last = computes[reached] if reached < len(computes) else len(order)
        horizons.append(bisect_right(receives, last))
    return horizons
