"""Names of segments: a role, and the kinds of the layers it has parts of where layers differ.

``attention.window`` is the attention of a layer of the kind ``window``; ``middle.window.full`` lies between
the attention of such a layer and that of one of the kind ``full``, ``middle.window`` between two alike.
"""

from __future__ import annotations


def segment_name(role: str, *kinds: str) -> str:
    """The name of a segment; an empty kind, of layers that are all alike, is left out."""
    return ".".join([role, *dict.fromkeys(kind for kind in kinds if kind)])


def role_of(name: str) -> str:
    """``attention``, ``first``, ``middle`` or ``last``, or the name of a stage."""
    return name.partition(".")[0]
