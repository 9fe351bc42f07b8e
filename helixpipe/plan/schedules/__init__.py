"""Schedules: one short file each, which places segments on ranks and orders their F, B and W.

A schedule is a function from a :class:`ScheduleRequest` to a compute-only plan, and its entry here says the
rest. Messages, buffers and checks come from the passes that all schedules share. Who reads data and where
losses are follows from a plan, see :meth:`Plan.read_by` and :meth:`Plan.losses_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from helixpipe.plan.execution import Execution
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules import (
    dualpipe_v,
    gpipe,
    helix,
    interleaved,
    one_f_one_b,
    per_batch,
    seq1f1b,
    sliced_helix,
    v_half,
    v_min,
    zb_h1,
    zb_v,
)
from helixpipe.plan.schedules.request import ScheduleRequest


@dataclass(frozen=True)
class Schedule:
    """What is to be known of a schedule; nothing else in the project asks for its name.

    Attributes:
        plan: makes its compute-only plan.
        execution: what runs it in training; None for a schedule that can only be planned.
        options: the optional arguments that mean something to it, as :class:`ScheduleRequest` names them.
        needs_untied_weights: it has both ends of the model as two model chunks on one rank, which cannot
            share the embedding's weight.
        splits_backward: its plans always have weight gradients apart (W).
        recomputes_by_default: training computes a layer again but for its attention, unless told otherwise.
        repeats_sequences: its micro batches are slices of sequences that follow one another with nothing to
            overlap, so that m of them take m times as long as one.
    """

    plan: Callable[[ScheduleRequest], Plan]
    execution: Execution | None
    options: frozenset[str] = frozenset()
    needs_untied_weights: bool = False
    splits_backward: bool = False
    recomputes_by_default: bool = False
    repeats_sequences: bool = False

    @property
    def slices_sequences(self) -> bool:
        """True if its micro batches are slices of sequences."""
        return self.repeats_sequences or "num_slices" in self.options

    @property
    def plans_ahead(self) -> bool:
        """True if one plan serves every iteration, False if each batch has its own."""
        return self.execution is None or not self.execution.plans_batches


SCHEDULES: dict[str, Schedule] = {
    "gpipe": Schedule(gpipe.plan, Execution.STAGES, frozenset({"stage_layers"})),
    "1f1b": Schedule(one_f_one_b.plan, Execution.MEGATRON, frozenset({"stage_layers"})),
    "interleaved": Schedule(
        interleaved.plan, Execution.MEGATRON, frozenset({"virtual_stages", "microbatch_group"})
    ),
    "zb-h1": Schedule(zb_h1.plan, Execution.STAGES, frozenset({"stage_layers"}), splits_backward=True),
    "zb-v": Schedule(zb_v.plan, Execution.STAGES, needs_untied_weights=True, splits_backward=True),
    "v-half": Schedule(v_half.plan, Execution.STAGES, needs_untied_weights=True, splits_backward=True),
    "v-min": Schedule(v_min.plan, Execution.STAGES, needs_untied_weights=True, splits_backward=True),
    "dualpipe-v": Schedule(
        dualpipe_v.plan, Execution.STAGES, needs_untied_weights=True, splits_backward=True
    ),
    "seq1f1b": Schedule(seq1f1b.plan, Execution.SLICES, frozenset({"num_slices"})),
    "helix": Schedule(
        helix.plan,
        Execution.SEGMENTS,
        frozenset(
            {
                "num_fold",
                "attention_range",
                "head_placement",
                "round_order",
                "split_weight_gradients",
                "costs",
                "layer_kinds",
            }
        ),
        recomputes_by_default=True,
    ),
    "sliced-helix": Schedule(
        sliced_helix.plan,
        Execution.SLICED_SEGMENTS,
        frozenset({"num_fold", "attention_range", "head_placement", "resend_context"}),
        recomputes_by_default=True,
        repeats_sequences=True,
    ),
    "elastic": Schedule(per_batch.plan, Execution.CHUNKS, frozenset({"stage_layers"})),
    "elastic-helix": Schedule(per_batch.plan, Execution.ROUNDS, recomputes_by_default=True),
}


def planned_ahead() -> list[str]:
    """Names of the schedules that sizes alone make a plan for."""
    return [name for name, entry in SCHEDULES.items() if entry.plans_ahead]


__all__ = ["SCHEDULES", "Schedule", "ScheduleRequest", "planned_ahead"]
