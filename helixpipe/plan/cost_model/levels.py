"""Levels of recomputation as a command line gives them: one for all layers, or one for each.

``products`` is a level for all layers; ``products:20,none:12`` gives it to the first twenty of 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from helixpipe.plan.cost_model.recomputation import Recompute

# Those that layers of ours carry out; the others are Megatron's.
LEVELS = (Recompute.NONE, Recompute.PRODUCTS, Recompute.WITHOUT_ATTENTION)


def parse_levels(text: str, num_layers: int) -> Recompute | tuple[Recompute, ...]:
    """The level of all layers, or of each.

    Raises:
        ValueError: an unknown level, or other layers than the model's.
    """
    if ":" not in text:
        return _level(text)
    levels: list[Recompute] = []
    for entry in text.split(","):
        name, _, count = entry.partition(":")
        if not (count.isascii() and count.isdigit() and int(count)):
            raise ValueError(f"{text}: {entry!r} needs its number of layers, like none:4")
        # A number far too large is told below, and makes no list.
        levels += [_level(name)] * min(int(count), num_layers + 1)
    if len(levels) != num_layers:
        raise ValueError(f"{text} must name each of the model's {num_layers} layers once")
    return levels[0] if len(set(levels)) == 1 else tuple(levels)


def spell_levels(levels: Recompute | Sequence[Recompute]) -> str:
    """The inverse of :func:`parse_levels`."""
    if isinstance(levels, Recompute):
        return levels.value
    return ",".join(f"{level.value}:{len(list(run))}" for level, run in groupby(levels))


def _level(name: str) -> Recompute:
    known = {level.value: level for level in LEVELS}
    if name not in known:
        raise ValueError(f"knows no level {name!r}; choose of {', '.join(known)}")
    return known[name]
