"""Where the slices of a plan end.

The order of slices does not depend on how long they are, so a plan can be made without. One that is executed
says it in its parameter ``slice_ends``: the last token (exclusive) of each slice, the same in every sequence.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from helixpipe.plan.equal_time import equal_time_ends
from helixpipe.plan.plan import Plan

_PARAMETER = "slice_ends"
# Kernels compute in tiles of so many tokens. Rounding to them must not make slices differ by much.
_TILE = 128
_TILES_PER_SLICE = 16


class TokenTimes(NamedTuple):
    """What a layer's time grows with, in any unit.

    Attributes:
        linear: of one token.
        attention: of its attention to itself: that of n tokens takes n^2 times as long.
    """

    linear: float
    attention: float


def with_slice_ends(plan: Plan, ends: tuple[int, ...]) -> Plan:
    """The plan of slices that end there."""
    return replace(plan, parameters={**plan.parameters, _PARAMETER: ",".join(map(str, ends))})


def cut_at_equal_times(plan: Plan, seq_length: int, times: TokenTimes, multiple: int) -> Plan:
    """The plan of slices that take equally long, at multiples of 128 tokens where sequences are long enough.

    Args:
        plan: of slices.
        seq_length: tokens of every sequence.
        times: of a layer.
        multiple: of what all ends must be, where tensor-parallel ranks share the sequence.

    Raises:
        ValueError: more slices than there are multiples; names the option.
    """
    count = len(plan.slices[0])
    tile = math.lcm(_TILE, multiple)
    wanted = tile if seq_length >= _TILES_PER_SLICE * tile * count else multiple
    try:
        ends = equal_time_ends(seq_length, count, *times, wanted)
    except ValueError as error:
        name = next(name for name in ("num_fold", "num_slices") if name in plan.parameters)
        option = f"--{name.replace('_', '-')} {plan.parameters[name]}"
        raise ValueError(f"{option}: {error}; use fewer") from None
    return with_slice_ends(plan, ends)


def slice_ends(plan: Plan) -> tuple[int, ...] | None:
    """The ends of the slices of every sequence; None if the plan does not say them.

    Raises:
        ValueError: they are not as many as the slices of a sequence, or do not rise.
    """
    text = plan.parameters.get(_PARAMETER)
    if text is None:
        return None
    words = str(text).split(",")
    ends = tuple(int(word) for word in words if word.isascii() and word.isdigit())
    count = len(plan.slices[0]) if plan.slices else 0
    if len(ends) != len(words) or len(ends) != count or any(a >= b for a, b in pairwise((0, *ends))):
        raise ValueError(
            f'the plan\'s "{_PARAMETER}" is {text!r:.60}; it must be {count} rising numbers of tokens, one '
            "for each slice of a sequence"
        )
    return ends


def ends_for(plan: Plan, seq_length: int, multiple: int) -> tuple[int, ...]:
    """The ends of the slices, for sequences of ``seq_length`` tokens.

    Args:
        plan: of slices.
        seq_length: tokens of every sequence.
        multiple: of what all ends must be, where tensor-parallel ranks share the sequence.

    Raises:
        ValueError: the plan does not say the ends, or they do not fit.
    """
    ends = slice_ends(plan)
    if ends is None:
        raise ValueError(f'the plan does not say in "{_PARAMETER}" where its slices end; plan with sizes')
    if ends[-1] != seq_length:
        raise ValueError(
            f"the plan cuts sequences of {ends[-1]} tokens, the job's have {seq_length} (--seq-length)"
        )
    uneven = [end for end in ends if end % multiple]
    if uneven:
        raise ValueError(
            f"the plan ends a slice at token {uneven[0]}, which {multiple} tensor-parallel ranks cannot "
            f'share; let all of "{_PARAMETER}" be multiples of {multiple}'
        )
    return ends
