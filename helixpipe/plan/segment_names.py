"""Names of segments: a role, and the kinds of the layers it has parts of where layers differ.

``attention.window`` is the attention of a layer of the kind ``window``; ``middle.window.full`` lies between
the attention of such a layer and that of one of the kind ``full``, ``middle.window`` between two alike.
"""

from __future__ import annotations


def segment_name(role: str, *kinds: str) -> str:
    """The name of a segment; an empty kind, of layers that are all alike, is left out."""
    return ".".join([role, *dict.fromkeys(kind for kind in kinds if kind)])


def role_of(name: str) -> str:
    """``attention``, ``qkv``, ``first``, ``middle`` or ``last``, or the name of a stage."""
    return name.partition(".")[0]


# What a plan that cuts layers at their attention has beside attention itself.
_WITHOUT_ATTENTION = frozenset(("first", "middle", "last", "qkv"))


def reads_context(name: str) -> bool:
    """True if a segment attends: to slices of a sequence it needs keys and values of earlier ones."""
    return role_of(name) not in _WITHOUT_ATTENTION
