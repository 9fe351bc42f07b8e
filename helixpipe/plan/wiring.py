"""What a plan's computations wait for and give rise to, by number: results, weights and keys on loan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from helixpipe.plan.computations import NONE, Computations, Numbers
from helixpipe.plan.context import ContextIndex, ContextMessage
from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Kind, Operation, message_of


class Wiring:
    """Contents that computations start with: each is a number.

    That of a computation's result is the computation's own. One number stands for results that the plan does
    not compute; then come the weights of loans, and the messages of contexts.

    Attributes:
        loans: in ascending order.
        contexts: messages of keys and values, and of their gradients.
        with_loans: by computation, the contents that it starts with, where these are more than the result
            that ``Computations.inputs`` names: weights, the result, keys and values.
        receivers: of each content, the rank that needs it; ``NONE`` if none does.
        receives: of each content, the operation that receives it.
        lent_at: by computation, the loans whose weights leave as it starts.
        returning: by computation, the loan of whose gradients it computes a part.
        resent_at: by computation, the contexts' messages that leave as it starts.
        after: by computation, the contexts' messages of which it makes a part.
        num_makers: of each context's message, how many computations make it.
        posted_after: of each content, after how many computations of its receiver it can be received; None
            where all can from the start: in a plan without messages.
    """

    def __init__(
        self,
        work: Computations,
        orders: Sequence[Sequence[Operation]],
        loans: Sequence[Loan],
        index: ContextIndex,
        *,
        is_lowered: bool,
    ) -> None:
        self._work = work
        self.loans = sorted(loans)
        self.contexts: list[ContextMessage] = sorted(index.producers)
        self.lent_at, self.returning = self._of_loans()
        self.resent_at: Mapping[int, list[int]] = self._of_contexts(index.at_start_of)
        self.after: Mapping[int, list[int]] = self._of_contexts(index.after)
        self.num_makers = [len(index.producers[message]) for message in self.contexts]
        self.with_loans = self._with_loans(index)
        self.receivers = [
            *work.receivers.tolist(),
            NONE,
            *(loan.borrower for loan in self.loans),
            *(message.receiver for message in self.contexts),
        ]
        self.posted_after = self._posted_after(orders) if is_lowered else None

    def needs(self, number: int) -> tuple[int, ...]:
        """All contents that a computation starts with."""
        return self.with_loans.get(number) or self._result_for(number)

    @property
    def first_loan(self) -> int:
        """The content that is the weights of the first loan."""
        return len(self._work.operations) + 1

    @property
    def first_context(self) -> int:
        """The content that is the first message of a context."""
        return self.first_loan + len(self.loans)

    def receive_of(self, content: int) -> Operation:
        """The operation that receives a content."""
        if content >= self.first_context:
            return self.contexts[content - self.first_context].receive
        if content >= self.first_loan:
            return self.loans[content - self.first_loan].weights_received
        result = self._work.operations[content]
        _, receive, edge = message_of(result)
        return Operation(edge, receive, result.micro_batch, self._work.rank_of(content))

    def _of_loans(self) -> tuple[dict[int, list[int]], dict[int, int]]:
        lent_at: dict[int, list[int]] = defaultdict(list)
        returning = {}
        for place, loan in enumerate(self.loans):
            # A loan's weights leave as the forward starts that feeds its first micro batch: lowering says so.
            feeding = Operation(loan.segment - 1, Kind.F, loan.micro_batches[0])
            lent_at[self._work.number(feeding)].append(place)
            for micro_batch in loan.micro_batches:
                returning[self._work.last_of(loan.segment, micro_batch)] = place
        return lent_at, returning

    def _of_contexts(self, messages: Mapping[Operation, Sequence[ContextMessage]]) -> dict[int, list[int]]:
        places = {message: place for place, message in enumerate(self.contexts)}
        return {
            self._work.number(operation): [places[message] for message in found]
            for operation, found in messages.items()
        }

    def _result_for(self, number: int) -> tuple[int, ...]:
        result = int(self._work.inputs[number]) if number < len(self._work.inputs) else NONE
        return () if result == NONE else (result,)

    def _with_loans(self, index: ContextIndex) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        for place, loan in enumerate(self.loans):
            for micro_batch in loan.micro_batches:
                forward = self._work.number(Operation(loan.segment, Kind.F, micro_batch))
                found[forward] = (self.first_loan + place, *self._result_for(forward))
        for number, places in self._of_contexts(index.needed_by).items():
            before = found.get(number) or self._result_for(number)
            found[number] = (*before, *(self.first_context + place for place in places))
        return found

    def _posted_after(self, orders: Sequence[Sequence[Operation]]) -> list[int]:
        posts = {}
        for rank, order in enumerate(orders):
            num_computed = 0
            for op in order:
                if op.kind.is_compute:
                    num_computed += 1
                elif op.kind.is_receive:
                    posts[rank, op] = num_computed
        # Weights on loan are always received in time.
        crossing = [*(edge != NONE for edge in self._work.edge_of.tolist()), *[False] * (1 + len(self.loans))]
        crossing += [True] * len(self.contexts)
        return [
            posts.get((receiver, self.receive_of(content)), 0) if crosses else 0
            for content, (receiver, crosses) in enumerate(zip(self.receivers, crossing, strict=True))
        ]


def borrowing(work: Computations, loans: Sequence[Loan]) -> list[tuple[Numbers, Numbers]]:
    """Of every rank, the loans that it takes, 1, and ends, -1, in the order of its computations.

    A loan lasts from the first of its computations to the last that adds to the weights' gradients; in a plan
    without backwards, to the last forward.
    """
    changes: list[list[tuple[int, int, int]]] = [[] for _ in work.begins[1:]]
    for place, loan in enumerate(loans):
        forwards = [work.number(op) for op in loan.operations(Kind.F)]
        ends = [work.last_of(loan.segment, i) for i in loan.micro_batches]
        last = max(forwards if max(ends) == len(work.operations) else ends)
        # Taken before others end, should both be at one computation.
        changes[loan.borrower] += (min(forwards), -1, place), (last, 1, place)
    rows = (np.array(sorted(found), dtype=np.int64).reshape(-1, 3) for found in changes)
    return [(row[:, 2], -row[:, 1]) for row in rows]
