"""Where to cut a sequence so that its slices take equally long."""

from __future__ import annotations

from math import sqrt


def equal_time_end(part: float, linear: float, attention: float) -> float:
    """The x with ``attention x^2 + linear x = part``: the length up to which work takes ``part``.

    The root in the form that does not cancel where attention is next to nothing.

    Args:
        part: time up to the cut.
        linear: time of one unit of length; above 0.
        attention: time of the attention of one unit of length to itself.
    """
    return 2 * part / (linear + sqrt(linear * linear + 4 * attention * part))
