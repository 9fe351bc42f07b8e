"""Where sequences are cut into slices: as a plan says, else into slices of equal time."""

from __future__ import annotations

import argparse

from helixpipe.plan.cost_model import HARDWARE, with_predicted_ends
from helixpipe.plan.plan import Plan
from helixpipe.plan.slice_ends import ends_for, slice_ends
from megatron.pretrain.settings.schedule_choice import known_machine, pieces_on, workload_of

# Of hardware that is not known; slices of another GPU's equal times are nearly as good.
_USUAL = "h100"


def cut_sequences(args: argparse.Namespace, plan: Plan) -> Plan:
    """The plan with the ends of its slices, for the job's sequences.

    Args:
        args: sizes and padded vocabulary size known.
        plan: of slices.

    Raises:
        ValueError: sequences that cannot be cut so, or that the plan's own ends do not fit.
    """
    shared = args.tensor_model_parallel_size if args.sequence_parallel else 1
    if slice_ends(plan) is None:
        machine = known_machine(args.hardware, args.attention_backend) or HARDWARE[_USUAL]
        plan = with_predicted_ends(pieces_on(machine, args.hardware, workload_of(args)), plan)
    ends_for(plan, args.seq_length, shared)
    return plan
