"""What a ``forward_backward_func`` needs of the segments of a model."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from helixpipe.megatron_adapter.forward_step import IterationInput, IterationResult
from helixpipe.runtime.executor import Segments


class IterationSize(NamedTuple):
    """What an executor is built for."""

    num_microbatches: int
    seq_length: int
    micro_batch_size: int
    forward_only: bool


class ModelSegments(Segments, Protocol):
    """Segments made of a model, fed by a forward step.

    Attributes:
        result: what the iteration has given so far.
        has_shared_weights: True if a weight of this rank is used by two segments, or by other ranks.
    """

    result: IterationResult
    has_shared_weights: bool

    def begin(self, iteration: IterationInput) -> None:
        """Take over an iteration's input."""

    def chunk_of(self, segment: int) -> int:
        """The position of the model chunk that holds a segment's weights."""

    def finish(self) -> None:
        """Check at the end of an iteration that nothing is left of it."""
