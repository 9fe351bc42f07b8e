"""Where sequences are cut into slices: as a plan says, else into slices of equal time."""

from __future__ import annotations

import argparse
import math

from helixpipe.plan.cost_model import HARDWARE, Pieces, predict_pieces
from helixpipe.plan.cost_model.work import LAYER_PIECES
from helixpipe.plan.equal_time import equal_time_ends
from helixpipe.plan.plan import Plan
from helixpipe.plan.slice_ends import ends_for, slice_ends, with_slice_ends
from megatron.pretrain.settings.schedule_choice import check_profile, known_machine, workload_of

# Of hardware that is not known; slices of another GPU's equal times are nearly as good.
_USUAL = "h100"
# Kernels compute in tiles of so many tokens. Rounding to them must not make slices differ by much.
_TILE = 128
_TILES_PER_SLICE = 16


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
        num_slices = len(plan.slices[0])
        tile = math.lcm(_TILE, shared)
        multiple = tile if args.seq_length >= _TILES_PER_SLICE * tile * num_slices else shared
        cuts_layers = "attention_range" in plan.parameters
        linear, attention = _token_times(args, forward_only=cuts_layers)
        try:
            ends = equal_time_ends(args.seq_length, num_slices, linear, attention, multiple)
        except ValueError as error:
            option = (
                f"--num-fold {plan.parameters['num_fold']}" if cuts_layers else f"--num-slices {num_slices}"
            )
            raise ValueError(f"{option}: {error}; use fewer") from None
        plan = with_slice_ends(plan, ends)
    ends_for(plan, args.seq_length, shared)
    return plan


def _token_times(args: argparse.Namespace, *, forward_only: bool) -> tuple[float, float]:
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
    return linear / args.seq_length, core / args.seq_length**2
