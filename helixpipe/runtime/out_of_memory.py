"""Memory that ran out: in which operation, and for how much."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.reliability.exit_codes import OUT_OF_MEMORY, JobError
from helixpipe.runtime.trace import Trace

_GIB = 2**30
# As allocators say: CUDA's "Tried to allocate 2.00 GiB", the CPU's "you tried to allocate 12 bytes".
_ASKED = re.compile(r"tried to allocate ([\d.]+ (?:bytes|[KMGT]iB))", re.IGNORECASE)
_KINDS = {Kind.F: "forward", Kind.B: "backward", Kind.W: "weight gradient"}


class OutOfMemory(JobError):
    """Memory ran out."""

    exit_code = OUT_OF_MEMORY


def amount_asked(error: RuntimeError) -> str | None:
    """How much an allocation wanted that failed; None for other errors."""
    found = _ASKED.search(str(error))
    if found is not None:
        return found[1]
    return "an unknown amount" if isinstance(error, torch.OutOfMemoryError) else None


@contextmanager
def naming_operation(plan: Plan, rank: int, trace: Trace) -> Iterator[None]:
    """Turn a failed allocation inside into an :class:`OutOfMemory` that names the operation that ran.

    Args:
        plan: what is being executed.
        rank: this pipeline rank.
        trace: knows the operation.
    """
    try:
        yield
    except RuntimeError as error:
        asked = amount_asked(error)
        if asked is None:
            raise
        where = "between two operations" if trace.current is None else describe(trace.current, plan)
        raise OutOfMemory(
            f"out of memory on pipeline rank {rank}, {where}: asked for {asked}{held()}"
        ) from error


def describe(operation: Operation, plan: Plan) -> str:
    """Like ``3F2, the forward of segment 3 (attention), micro batch 2``."""
    name = plan.segment_names[operation.segment]
    return (
        f"{operation}, the {_KINDS[operation.kind]} of segment {operation.segment} ({name}), "
        f"micro batch {operation.micro_batch}"
    )


def held() -> str:
    """What a GPU's allocator holds, as the end of a sentence; nothing on a CPU, which has no such figures."""
    if not torch.cuda.is_available():
        return ""
    _, total = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return (
        f", with {allocated / _GIB:.1f} GiB in tensors and {(reserved - allocated) / _GIB:.1f} GiB reserved "
        f"beside them, of {total / _GIB:.1f} GiB"
    )
