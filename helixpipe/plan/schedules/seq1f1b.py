"""Seq1F1B: 1F1B over slices of sequences (Sun et al. 2024, arXiv 2406.03488).

A sequence is cut into slices that take equally long, so later ones, which attend to more, are shorter. A
slice reads the keys and values of the slices before it; backwards run in reverse, since every slice adds
to the gradients of those keys and values.
"""

from __future__ import annotations

from dataclasses import replace

from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules.one_f_one_b import one_forward_one_backward
from helixpipe.plan.schedules.request import ScheduleRequest, stage_plan

DEFAULT_SLICES = 4


def plan(request: ScheduleRequest) -> Plan:
    """The compute-only Seq1F1B plan.

    Its micro batches are the slices: slice ``j`` of sequence ``i`` has the number ``i * num_slices + j``.
    """
    p, num_slices = request.num_ranks, request.num_slices or DEFAULT_SLICES
    sliced = replace(request, num_microbatches=request.num_microbatches * num_slices)
    sequences = tuple(
        tuple(range(first, first + num_slices)) for first in range(0, sliced.num_microbatches, num_slices)
    )
    forwards = [i for sequence in sequences for i in sequence]
    backwards = [i for sequence in sequences for i in reversed(sequence)]
    orders = (
        one_forward_one_backward(
            [Operation(rank, Kind.F, i) for i in forwards],
            [Operation(rank, Kind.B, i) for i in backwards],
            # The first backward is that of a last slice: a whole sequence must have come through.
            warmup=p - rank - 1 + num_slices - 1,
        )
        for rank in range(p)
    )
    return replace(
        stage_plan("seq1f1b", sliced, orders, parameters={"num_slices": num_slices}),
        micro_batch_names=tuple(f"slice{j}" for sequence in sequences for j in range(len(sequence))),
        slices=sequences,
    )
