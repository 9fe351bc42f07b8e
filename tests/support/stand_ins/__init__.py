"""Stand-ins for libraries that need a GPU, on paths of their own.

``flash``: flash_attn and FlashAttention-3; ``engine``: Transformer Engine. They have the libraries' names and
signatures, compute from their arguments in float64, and refuse what the libraries refuse.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parent


@contextmanager
def installed(*names: str) -> Iterator[None]:
    """The stand-ins can be imported; afterwards they are forgotten."""
    paths = [str(FOLDER / name) for name in names]
    before = set(sys.modules)
    sys.path[:0] = paths
    try:
        yield
    finally:
        for path in paths:
            sys.path.remove(path)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("flash_attn", "flash_attn_interface", "transformer_engine"):
                del sys.modules[name]
