"""A rank's state as its sentinel reports it, and how it is put into words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALIVE, STOPPED, DEAD, FAILED, ENDED = "alive", "stopped", "dead", "failed", "ended"

_PASSES = {"F": "forward", "B": "backward", "W": "weight gradient"}
_CARGO = {
    "F": "the activations of micro batch {micro_batch} after segment {segment}",
    "B": "the gradient of micro batch {micro_batch} after segment {segment}",
    "P": "the weights lent for segment {segment} from micro batch {micro_batch} on",
    "G": "the gradients of the weights lent for segment {segment} from micro batch {micro_batch} on",
    "K": "the keys and values lent for segment {segment} from micro batch {micro_batch} on",
    "KB": "the keys and values lent again for segment {segment} from micro batch {micro_batch} on",
    "D": "the gradients of the keys and values lent for segment {segment} from micro batch {micro_batch} on",
}


@dataclass(frozen=True)
class Status:
    """One rank, as last heard of.

    Attributes:
        rank, stage, host: where it is; ``stage`` is its pipeline rank.
        condition: ``ALIVE``; ``STOPPED`` by a signal; ``DEAD`` without a word; ``FAILED`` with an error of
            its own; ``ENDED`` in good order.
        step, place, phase: how far it is, see :class:`helixpipe.reliability.record.Record`.
        operation: in hand, as plans write it; empty between operations.
        message: that it waits for, as plans write it; empty if for none.
        peer: the rank at the other end of ``message``.
        last: completed last, as plans write it; empty if nothing was.
        seconds: for how long ``operation``, ``message`` or the time between has lasted.
        deadline_s: the longest that it may.
        answers: False if the interpreter has not run for a while.
        error: of a rank that has failed.
    """

    rank: int
    stage: int
    host: str
    condition: str = ALIVE
    step: int = 0
    place: int = 0
    phase: str = ""
    operation: str = ""
    message: str = ""
    peer: int | None = None
    last: str = ""
    seconds: float = 0.0
    deadline_s: float = float("inf")
    answers: bool = True
    error: str = ""

    @property
    def is_overdue(self) -> bool:
        """True if it has stood still for longer than it may."""
        return self.condition in (ALIVE, STOPPED) and self.seconds > self.deadline_s

    @property
    def name(self) -> str:
        """Like ``rank 2 (stage 2, host node1)``."""
        return f"rank {self.rank} (stage {self.stage}, host {self.host})"

    @property
    def position(self) -> str:
        """Like ``step 20, waiting 5.1 s for … from rank 1 (2RECV_F3@1); last completed 0B1``."""
        where = f"step {self.step}" if self.step else "before the first step"
        last = f"; last completed {self.last}" if self.last else ""
        return f"{where}, {self._activity}{last}"

    @property
    def _activity(self) -> str:
        if self.message:
            sends = "SEND" in self.message
            end = f"to be taken by rank {self.peer}" if sends else f"from rank {self.peer}"
            return f"waiting {self.seconds:.1f} s for {explain(self.message)} {end} ({self.message})"
        if self.operation:
            return f"{self.seconds:.1f} s in {self.operation} ({explain(self.operation)})"
        return f"{self.seconds:.1f} s in phase {self.phase!r}, between operations"

    @classmethod
    def from_message(cls, found: Mapping[str, Any]) -> Status:
        """Read back what ``dataclasses.asdict`` gave."""
        return cls(**found)


def explain(operation: str) -> str:
    """An operation in words: ``3F2`` is "forward of segment 3, micro batch 2"."""
    segment = operation[: next(i for i, letter in enumerate(operation) if not letter.isdigit())]
    kind, _, peer = operation[len(segment) :].partition("@")
    name = kind.rstrip("0123456789")
    micro_batch = kind[len(name) :]
    if peer:
        return _CARGO[name.partition("_")[2]].format(segment=segment, micro_batch=micro_batch)
    return f"{_PASSES[name]} of segment {segment}, micro batch {micro_batch}"
