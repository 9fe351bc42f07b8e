"""Slices of a sequence: which share of it each holds, and what attention loses on short ones.

A flash-attention kernel deals tiles of 128 rows of every head to the multiprocessors: queries in the forward
pass, keys in the backward pass. Tiles that do not fill the last wave leave multiprocessors idle. A slice is
two calls, earlier keys without a mask and its own with one, and each costs a fixed time besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, lcm

from helixpipe.plan.cost_model.pieces import PieceCost, Pieces
from helixpipe.plan.cost_model.work import LAYER_PIECES
from helixpipe.plan.equal_time import equal_time_end, equal_time_ends
from helixpipe.plan.plan import Plan
from helixpipe.plan.slice_ends import TokenTimes, cut_at_equal_times, slice_ends

# Rows of a tile of flash attention, head dimension 128 (FlashAttention-3, arXiv 2407.08608, section 3).
_TILE = 128
# Start and end of a kernel, and the merging of two partial results.
_CALL_MS = 0.02
# Slices are multiples of this many tokens: whole tiles.
TOKEN_MULTIPLE = _TILE


@dataclass(frozen=True)
class Slice:
    """A part of a sequence.

    Attributes:
        tokens: its share of the tokens.
        area: its share of the attention's triangle.
        end: share of the sequence's tokens up to its end; 1 for the whole.
    """

    tokens: float = 1.0
    area: float = 1.0
    end: float = 1.0


WHOLE = Slice()


def slices_up_to(ends: Sequence[float]) -> list[Slice]:
    """Slices from their ends, as shares of the sequence's tokens."""
    return [Slice(end - start, end * end - start * start, end) for start, end in pairwise((0.0, *ends))]


def _layer_ms(pieces: Pieces, *, forward_only: bool) -> tuple[float, float]:
    """Of a layer, as their mean: all that grows with length, and what grows with its square.

    Attention through windows grows with length, but for the first tokens.
    """
    costs = {name: pieces.times[name] for name in LAYER_PIECES}
    times = {name: cost.forward if forward_only else cost.total for name, cost in costs.items()}
    model, length = pieces.workload.model, pieces.workload.seq_length
    core, of_mlp = times.pop("core"), times["fc1"] + times["fc2"]
    mlp_share = sum(map(model.mlp_share, range(model.num_layers))) / model.num_layers
    linear = sum(times.values()) - (1.0 - mlp_share) * of_mlp
    shares = [model.core_share(layer, length) for layer in range(model.num_layers)]
    through_windows = [share for share in shares if share < 1.0]
    num_full = model.num_layers - len(through_windows)
    return linear + core * sum(through_windows) / model.num_layers, core * num_full / model.num_layers


def with_predicted_ends(pieces: Pieces, plan: Plan) -> Plan:
    """A plan of slices that says where they end: as it does already, else where they take equally long.

    Where layers are cut at their attention all slices of a sequence run forward before one runs backward:
    their forwards are to take equally long. Else forward and backward take turns.

    Raises:
        ValueError: more slices than the sequence can have; names the option.
    """
    if slice_ends(plan) is not None:
        return plan
    workload = pieces.workload
    length = workload.seq_length
    linear, core = _layer_ms(pieces, forward_only="attention_range" in plan.parameters)
    multiple = workload.tensor_parallel if workload.sequence_parallel else 1
    return cut_at_equal_times(plan, length, TokenTimes(linear / length, core / length**2), multiple)


def equal_total_slices(pieces: Pieces, count: int) -> list[Slice]:
    """Slices whose forward and backward together take equally long."""
    linear, core = _layer_ms(pieces, forward_only=False)
    return slices_up_to(
        [equal_time_end((linear + core) * (j + 1) / count, linear, core) for j in range(count)]
    )


def equal_forward_slices(pieces: Pieces, count: int) -> list[Slice]:
    """Slices whose forward takes equally long, in tokens that kernels and tensor parallelism can take."""
    workload = pieces.workload
    linear, core = _layer_ms(pieces, forward_only=True)
    multiple = lcm(TOKEN_MULTIPLE, workload.tensor_parallel)
    length = workload.seq_length
    ends = equal_time_ends(length, count, linear / length, core / length**2, multiple)
    return slices_up_to([end / length for end in ends])


def core_cost(pieces: Pieces, part_of: Slice) -> PieceCost:
    """Attention of a slice to the sequence up to its end."""
    whole = pieces.times["core"]
    if part_of == WHOLE or not pieces.multiprocessors:
        return PieceCost(whole.forward * part_of.area, whole.backward * part_of.area)
    return PieceCost(
        whole.forward * part_of.area / _occupancy(pieces, part_of.tokens) + 2 * _CALL_MS,
        whole.backward * part_of.area / _occupancy(pieces, part_of.end) + 2 * _CALL_MS,
    )


def _occupancy(pieces: Pieces, share: float) -> float:
    """Share of the multiprocessors that tiles of so much of the sequence keep busy, over all waves."""
    workload = pieces.workload
    heads = workload.micro_batch_size * workload.model.num_heads / workload.tensor_parallel
    waves = heads * ceil(round(workload.seq_length * share) / _TILE) / pieces.multiprocessors
    return waves / ceil(waves)
