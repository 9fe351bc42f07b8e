"""Planning without Python's search for cycles of garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_cycle_collection() -> Iterator[None]:
    """Leave out the collection of cycles.

    Plans are millions of small tuples that never form one; going through them time and again takes several
    times as long as planning itself. They are freed as ever when nothing refers to them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
