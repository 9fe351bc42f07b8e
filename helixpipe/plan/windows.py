"""Sliding windows of attention, as Megatron's options name them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from helixpipe.plan.layer_patterns import find_pattern

_WINDOW = re.compile(r"\(?([0-9]{1,9}), ?0\)?", re.ASCII)
_PERIOD = re.compile(r"[0-9]{1,4}", re.ASCII)

# Every how many layers one sees all tokens before it; or for each layer, 1 for a window.
SkipFrequency = int | tuple[int, ...]


def parse_window(text: str) -> tuple[int, int]:
    """``4095,0`` of ``--window-size``: tokens before and after its own that a token sees.

    Raises:
        ValueError: anything else.
    """
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:40]!r} is no window; give the tokens before, and 0 after, like 4095,0")
    return int(found[1]), 0


def parse_skip_frequency(text: str) -> SkipFrequency:
    """``6``, ``[1,1,0]`` or ``([1]*5+[0])*4`` of ``--window-attn-skip-freq`` and ``--no-rope-freq``.

    Raises:
        ValueError: anything else.
    """
    if _PERIOD.fullmatch(text) and int(text) > 1:
        return int(text)
    found = find_pattern(text)
    if found is None:
        raise ValueError(
            f"{text[:40]!r} says not which layers; give a period of 2 or more, like 6, or 1 or "
            "0 for each layer, like [1,1,0]"
        )
    return found


def kinds_of_windows(windows: Sequence[int]) -> list[str]:
    """A name for each layer by what it sees, ``full`` or ``window`` and its tokens; none if all see alike."""
    names = [f"window{window}" if window else "full" for window in windows]
    return names if len(set(names)) > 1 else []


def join_kinds(*told: Sequence[str]) -> tuple[str, ...]:
    """One name for each layer from several, of which some may be empty."""
    return tuple("-".join(filter(None, names)) for names in zip(*told, strict=True))


def windows_of_layers(
    window: Sequence[int] | None, skip_frequency: SkipFrequency | None, num_layers: int
) -> tuple[int, ...]:
    """How many tokens each layer's attention sees, its own included, 0 for all; empty if all see all.

    Raises:
        ValueError: a pattern of another number of layers.
    """
    if window is None:
        return ()
    if isinstance(skip_frequency, tuple) and len(skip_frequency) != num_layers:
        raise ValueError(
            f"--window-attn-skip-freq has {len(skip_frequency)} layers, and --num-layers is {num_layers}; "
            "give one number for each"
        )
    size = window[0] + 1
    if skip_frequency is None:
        return (size,) * num_layers
    if isinstance(skip_frequency, int):
        return tuple(size if (layer + 1) % skip_frequency else 0 for layer in range(num_layers))
    return tuple(size if has_window else 0 for has_window in skip_frequency)
