"""The executor: runs one rank's operations in the plan's order, and decides nothing itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch

from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Kind, Operation, input_of, output_edge
from helixpipe.plan.plan import Plan
from helixpipe.plan.simulation.message_buffers import MAX_UNADDED_GRADIENTS
from helixpipe.reliability.record import NoProgress, Progress
from helixpipe.runtime.communicator import Communicator
from helixpipe.runtime.context_lending import ContextSteps
from helixpipe.runtime.header import Message
from helixpipe.runtime.lending import WeightLending
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.profiler_ranges import with_ranges
from helixpipe.runtime.run_ahead import RUN_AHEAD, DeviceEvent, RunAhead, record_cuda_event
from helixpipe.runtime.steps import (
    Backward,
    BackwardContext,
    Borrowing,
    Forward,
    Saved,
    Segments,
    Step,
    WeightGradient,
    no_context,
)
from helixpipe.runtime.store import ActivationStore
from helixpipe.runtime.trace import Trace
from helixpipe.runtime.transfers import Mail, Receive, Send, Slot, Source, Tensors

__all__ = ["Executor", "Segments", "Tensors"]


class Executor:
    """Runs a lowered plan on one rank, once per call of :meth:`run`.

    Each operation of the order is bound to its step when the executor is made: nothing is looked up while
    they run.

    Args:
        plan: a validated, lowered plan.
        segments: the computation.
        communicator: this rank's end; its rank selects the order.
        device: where received tensors live.
        trace: records what was run.
        progress: told of every operation and wait as it begins, for whoever watches this rank.
        run_ahead: how many compute operations the host may have started that the device has not ended.
        record_event: marks the present end of the device's work; None marks it where ``device`` is a GPU and
            does without elsewhere, where the host computes itself and is never ahead.
        backward_context: entered around each B and W; lets the caller hold back gradient reduction.
    """

    def __init__(
        self,
        plan: Plan,
        segments: Segments,
        communicator: Communicator,
        *,
        device: torch.device,
        trace: Trace,
        progress: Progress | None = None,
        run_ahead: int = RUN_AHEAD,
        record_event: Callable[[], DeviceEvent] | None = None,
        backward_context: BackwardContext | None = None,
    ) -> None:
        assert plan.is_lowered
        assert plan.num_ranks == communicator.size
        assert not plan.loans or segments.lending is not None
        assert not plan.contexts or segments.contexts is not None
        self.plan = plan
        self.segments = segments
        self.communicator = communicator
        self.device = device
        self.trace = trace
        self.progress = progress or NoProgress()
        self.store: ActivationStore[Saved] = ActivationStore()
        self._backward_context = backward_context or no_context
        self._order = plan.orders[communicator.rank]
        self._sends: dict[Operation, Send] = {}
        self._receives: dict[Operation, Receive] = {}
        self._contexts: ContextSteps | None = None
        if segments.contexts is not None:
            self._contexts = ContextSteps(
                plan, communicator.rank, segments.contexts, self._sends, self._receives
            )
        messages = {op: list(self._messages(op)) for op in self._order if not op.kind.is_compute}
        self.mail = Mail(
            communicator,
            int(plan.fingerprint[:15], 16),
            [message for buffers in messages.values() for message in buffers],
            device,
            trace,
            self.progress,
        )
        if record_event is None and device.type == "cuda":
            record_event = record_cuda_event
        if record_event is not None:
            self.mail.run_ahead = RunAhead(run_ahead, record_event, self.mail.release, self.progress)
        for op, found in messages.items():
            if op.kind.is_send:
                self._sends[op] = Send(self.mail, op, found)
            else:
                self._receives[op] = Receive(self.mail, op, found)
        self._slots = {op: Slot() for op in self._order if output_edge(op, plan.num_segments)}
        self._returned: deque[Operation] = deque()
        self.steps = self._bind()

    def run(self) -> None:
        """Execute this rank's operations of one iteration.

        Raises:
            ValueError: a message is not the one that the plan expects, see :meth:`check_messages`.
        """
        self.trace.start()
        begin, ended = self.progress.begin, self.trace.operations.append
        with torch.set_grad_enabled(self.plan.has_backward):
            for operation, step in with_ranges(self.steps):
                begin(operation)
                step()
                ended(operation)
            self.mail.finish()
            while self._returned:
                self._take_back()
        if self.mail.run_ahead is not None:
            self.mail.run_ahead.finish()
        self.trace.stop()
        self.progress.end()
        self._assert_empty()

    def check_messages(self) -> None:
        """Where messages are not on the CPU, compare what has arrived, before its results are used.

        Raises:
            ValueError: a message was not the one that the plan expects.
        """
        self.mail.headers.finish()

    def _assert_empty(self) -> None:
        self.store.assert_empty()
        self.segments.weight_gradients.assert_empty()
        if self.segments.lending is not None:
            self.segments.lending.assert_empty()
        if self.segments.contexts is not None:
            self.segments.contexts.assert_empty()
        left = [str(op) for op, slot in self._slots.items() if not slot.is_empty]
        left += [str(op) for op, receive in self._receives.items() if receive.is_posted]
        assert not left, f"results and messages that nobody took: {', '.join(left)}"

    def _bind(self) -> list[tuple[Operation, Step]]:
        """The order with what each of its operations does."""
        bind: dict[Kind, Callable[[Operation], Step]] = {
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
            **dict.fromkeys((Kind.SEND_K, Kind.SEND_KB, Kind.SEND_D), self._send_context),
            **dict.fromkeys((Kind.RECV_K, Kind.RECV_KB, Kind.RECV_D), self._receive),
        }
        steps = {op: bind[op.kind](op) for op in self._order}
        for loan in self.plan.loans:
            if loan.borrower == self.communicator.rank:
                self._bind_loan(loan, steps)
        if self._contexts is not None:
            self._contexts.bind(steps)
        self._bind_buffers(steps)
        if self.mail.run_ahead is not None:
            for op in filter(lambda op: op.kind.is_compute, steps):
                steps[op] = _followed(steps[op], self.mail.run_ahead.started)
        return list(steps.items())

    def _forward(self, operation: Operation) -> Step:
        segment, micro_batch = operation.segment, operation.micro_batch
        return Forward(
            operation,
            self.segments,
            self._source(operation),
            self._slots.get(operation),
            self.store if self.plan.has_backward else None,
            self.segments.layout(segment - 1, micro_batch) if segment > 0 else None,
            self.device,
            self.trace,
        )

    def _backward(self, operation: Operation) -> Step:
        splits = operation.micro_batch in self.plan.split_micro_batches
        source = self._source(operation)
        if self._contexts is not None:
            source = self._contexts.source(operation, source)
        return Backward(
            operation,
            source,
            self._slots.get(operation),
            self.store,
            self.device,
            self.trace,
            self._backward_context,
            self.segments.weight_gradients if splits else None,
        )

    def _weight_gradient(self, operation: Operation) -> Step:
        return WeightGradient(operation, self.segments.weight_gradients, self.trace, self._backward_context)

    def _source(self, operation: Operation) -> Source | None:
        """The neighbour's result: from this rank, or from a message."""
        producer = input_of(operation, self.plan.num_segments)
        if producer is None:
            return None
        return self._slots.get(producer) or self._receives[self.plan.receive_of(producer)]

    def _send(self, operation: Operation) -> Step:
        forward = operation.kind is Kind.SEND_F
        producer = Operation(
            operation.segment if forward else operation.segment + 1,
            Kind.F if forward else Kind.B,
            operation.micro_batch,
        )
        slot, send = self._slots[producer], self._sends[operation]
        return lambda: send.post(slot.take())

    def _receive(self, operation: Operation) -> Step:
        return self._receives[operation].post

    def _send_context(self, operation: Operation) -> Step:
        assert self._contexts is not None
        return self._contexts.send(operation)

    def _lend(self, operation: Operation) -> Step:
        lending, send = self._lending, self._sends[operation]
        return lambda: send.post(lending.lend(operation.segment))

    def _give_back(self, operation: Operation) -> Step:
        lending, send = self._lending, self._sends[operation]
        loan = next(loan for loan in self.plan.loans if loan.gradients_sent == operation)
        return lambda: send.post(lending.give_back(loan))

    def _receive_gradients(self, operation: Operation) -> Step:
        def step() -> None:
            self._receives[operation].post()
            self._returned.append(operation)
            if len(self._returned) > MAX_UNADDED_GRADIENTS:
                self._take_back()

        return step

    def _take_back(self) -> None:
        message = self._returned.popleft()
        self._lending.take_back(message.segment, self._receives[message].take())

    def _bind_loan(self, loan: Loan, steps: dict[Operation, Step]) -> None:
        """Its weights come with the first forward and, where no gradients return, go after the last."""
        forwards = [op for op in self._order if op in loan.operations(Kind.F)]
        weights = self._receives[loan.weights_received]
        for forward in dict.fromkeys((forwards[0], forwards[-1])):
            steps[forward] = Borrowing(
                steps[forward],
                self._lending,
                loan,
                weights if forward == forwards[0] else None,
                forgets=not self.plan.has_backward and forward == forwards[-1],
            )

    def _bind_buffers(self, steps: dict[Operation, Step]) -> None:
        """Buffers of what was received are used again after the last operation that reads them."""
        for operation in self._order:
            needed = input_of(operation, self.plan.num_segments)
            if needed is None or needed in self._slots:
                continue
            receive = self._receives[self.plan.receive_of(needed)]
            receive.gives_back = True
            is_kept = operation.kind is Kind.F and self.plan.has_backward
            # What a forward alone reads is in the buffers behind the first.
            steps[operation] = _followed(steps[operation], partial(receive.give_back, int(is_kept)))
            if is_kept:
                backward = operation._replace(kind=Kind.B)
                steps[backward] = _followed(steps[backward], receive.give_back)

    @property
    def _lending(self) -> WeightLending:
        assert self.segments.lending is not None
        return self.segments.lending

    # What a message carries, as kinds say it behind SEND_ and RECV_, and its buffer, in its tag.
    _CARRIED = ("F", "B", "P", "G", "K", "KB", "D")
    _MAX_BUFFERS = 2

    def _messages(self, operation: Operation) -> Iterator[Message]:
        """The buffers of a message, each with a tag of its own."""
        number = operation.segment * self.plan.num_microbatches + operation.micro_batch
        carried = operation.kind.value.partition("_")[2]
        number = number * len(self._CARRIED) + self._CARRIED.index(carried)
        layouts = self._layouts(operation)
        assert len(layouts) <= self._MAX_BUFFERS
        for part, layout in enumerate(layouts):
            yield Message(operation, number * self._MAX_BUFFERS + part, layout)

    def _layouts(self, operation: Operation) -> tuple[MessageLayout, ...]:
        if operation.kind in (Kind.SEND_P, Kind.RECV_P):
            return (self._lending.weight_layout(operation.segment),)
        if operation.kind in (Kind.SEND_G, Kind.RECV_G):
            return (self._lending.gradient_layout(operation.segment),)
        if operation.kind not in (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B):
            assert self._contexts is not None
            return (self._contexts.layout(operation),)
        layout = self.segments.layout(operation.segment, operation.micro_batch)
        is_kept = self.plan.has_backward and operation.kind in (Kind.SEND_F, Kind.RECV_F)
        return layout.split() if is_kept else (layout,)


def _followed(step: Step, then: Step) -> Step:
    def both() -> None:
        step()
        then()

    return both
