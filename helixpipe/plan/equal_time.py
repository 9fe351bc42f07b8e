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


def equal_time_ends(
    length: int, num_slices: int, linear: float, attention: float, multiple: int = 1
) -> tuple[int, ...]:
    """Ends of ``num_slices`` slices of a sequence that take equally long: slice j ends where
    ``attention x^2 + linear x = (j/K)(attention S^2 + linear S)``.

    Args:
        length: tokens S of the sequence.
        num_slices: K.
        linear: time of one token; above 0.
        attention: time of the attention of one token to itself.
        multiple: of what all ends but the last are. Every slice has at least one token.

    Raises:
        ValueError: more slices than there are multiples.
    """
    units = -(-length // multiple)
    if not 1 <= num_slices <= units:
        of = f" of a multiple of {multiple}" if multiple > 1 else ""
        raise ValueError(f"a sequence of {length} tokens cannot be cut into {num_slices} slices{of}")
    total = attention * length * length + linear * length
    ends: list[int] = []
    for j in range(1, num_slices):
        x = equal_time_end(total * j / num_slices, linear, attention) / multiple
        first = ends[-1] + 1 if ends else 1
        ends.append(min(max(round(x), first), units - (num_slices - j)))
    return (*(end * multiple for end in ends), length)
