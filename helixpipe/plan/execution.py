"""How the operations of a schedule are carried out in training."""

from __future__ import annotations

from enum import Enum


class Execution(Enum):
    """What runs the operations of a schedule in training; the Megatron adapter has one entry for each."""

    MEGATRON = "whole layers in the order of ranks, by Megatron's own functions"
    STAGES = "whole layers, one of Megatron's model chunks per segment, by the plan"
    SEGMENTS = "layers cut at their attention, by the plan"
    SLICES = "whole layers over slices of sequences, by the plan"
    SLICED_SEGMENTS = "layers cut at their attention, over slices of sequences, by the plan"
    CHUNKS = "whole layers over chunks of documents, by a plan for every batch"
    ROUNDS = "layers cut at their attention, over chunks of documents, by a plan for every batch"

    @property
    def plans_batches(self) -> bool:
        """True if every batch has a plan of its own, made by the lengths of its sequences."""
        return self in (Execution.CHUNKS, Execution.ROUNDS)

    @property
    def joins_documents(self) -> bool:
        """True if samples are cut from joined documents, all equally long."""
        return not self.plans_batches

    @property
    def recomputes_whole_layers(self) -> bool:
        """True if Megatron's own recomputation can be asked for."""
        return self in (Execution.MEGATRON, Execution.STAGES, Execution.SLICES)

    @property
    def recomputes_parts_of_layers(self) -> bool:
        """True if our levels of recomputation can be asked for.

        In whole layers they free keys and values, which layers over parts of sequences keep for later parts.
        """
        return self.cuts_layers or not self.cuts_sequences

    @property
    def cuts_layers(self) -> bool:
        """True if a layer's attention is a segment of its own."""
        return self in (Execution.SEGMENTS, Execution.SLICED_SEGMENTS, Execution.ROUNDS)

    @property
    def has_slices(self) -> bool:
        """True if the micro batches of a plan are slices of sequences."""
        return self in (Execution.SLICES, Execution.SLICED_SEGMENTS)

    @property
    def cuts_sequences(self) -> bool:
        """True if attention runs over parts of sequences, which attend to the parts before them."""
        return self.has_slices or self.plans_batches
