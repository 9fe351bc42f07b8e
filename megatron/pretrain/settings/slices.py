"""Where sequences are cut into slices: as a plan says, else into slices of equal time."""

from __future__ import annotations

import argparse

from helixpipe.plan.cost_model import HARDWARE, Pieces, predict_pieces
from helixpipe.plan.cost_model.work import LAYER_PIECES
from helixpipe.plan.plan import Plan
from helixpipe.plan.slice_ends import TokenTimes, cut_at_equal_times, ends_for, slice_ends
from megatron.pretrain.settings.schedule_choice import check_profile, known_machine, workload_of

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
        times = _token_times(args, forward_only="attention_range" in plan.parameters)
        plan = cut_at_equal_times(plan, args.seq_length, times, shared)
    ends_for(plan, args.seq_length, shared)
    return plan


def _token_times(args: argparse.Namespace, *, forward_only: bool) -> TokenTimes:
    """Times in a layer of a token, and of its attention to itself.

    Where layers are cut at their attention all slices run forward before one runs backward: their forwards
    are to take equally long. Else forward and backward take turns.
    """
    machine, workload = known_machine(args), workload_of(args)
    if isinstance(machine, Pieces):
        check_profile(args, machine, workload)
        pieces = machine
    else:
        pieces = predict_pieces(workload, machine or HARDWARE[_USUAL])
    costs = {piece: pieces.times[piece] for piece in LAYER_PIECES}
    times = {piece: cost.forward if forward_only else cost.total for piece, cost in costs.items()}
    core = times.pop("core")
    linear = sum(times.values())
    return TokenTimes(linear / args.seq_length, core / args.seq_length**2)
