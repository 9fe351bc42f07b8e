"""Loans: weights that a rank uses for some micro batches although another rank owns them."""

from __future__ import annotations

from typing import NamedTuple

from helixpipe.plan.operation import Kind, Operation


class Loan(NamedTuple):
    """``owner``'s weights of ``segment`` are used by ``borrower`` for these micro batches.

    The weights travel once, before the first forward, and the sum of their gradients returns once, after
    the last B or W. Both messages carry the borrowing segment and the loan's first micro batch.
    """

    segment: int
    owner: int
    borrower: int
    micro_batches: tuple[int, ...]

    @property
    def weights_sent(self) -> Operation:
        """The owner's end of the weights' message."""
        return Operation(self.segment, Kind.SEND_P, self.micro_batches[0], self.borrower)

    @property
    def weights_received(self) -> Operation:
        """The borrower's end of the weights' message."""
        return self.weights_sent.counterpart(self.owner)

    @property
    def gradients_sent(self) -> Operation:
        """The borrower's end of the gradients' message."""
        return Operation(self.segment, Kind.SEND_G, self.micro_batches[0], self.owner)

    @property
    def gradients_received(self) -> Operation:
        """The owner's end of the gradients' message."""
        return self.gradients_sent.counterpart(self.borrower)

    def operations(self, kind: Kind) -> set[Operation]:
        """The computations of one kind for which the weights are borrowed."""
        return {Operation(self.segment, kind, micro_batch) for micro_batch in self.micro_batches}
