"""Liveness of activations: what each rank holds at its peak."""

from __future__ import annotations

from collections.abc import Mapping

from helixpipe.plan.operation import Kind
from helixpipe.plan.plan import Plan


def peak_bytes(plan: Plan, bytes_of_segment: Mapping[str, int]) -> list[int]:
    """Peak bytes of activations per rank.

    What a forward keeps lives from the start of F to the end of the micro batch's last backward operation
    on that segment: W if the plan has weight-gradient operations, else B. An evaluation plan keeps nothing.
    """
    last = Kind.W if plan.splits_backward else Kind.B
    peaks = []
    for order in plan.orders:
        held = peak = 0
        for op in order:
            if op.kind is Kind.F:
                size = bytes_of_segment[plan.segment_names[op.segment]]
                peak = max(peak, held + size)
                held += size if plan.has_backward else 0
            elif op.kind is last:
                held -= bytes_of_segment[plan.segment_names[op.segment]]
        peaks.append(peak)
    return peaks


def peak_activations(plan: Plan) -> list[int]:
    """Peak number of (segment, micro batch) pairs that each rank holds for its backward pass."""
    return peak_bytes(plan, dict.fromkeys(plan.segment_names, 1))
