"""Weight gradients that B leaves for W."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from helixpipe.runtime.store import ActivationStore, Key

Work: TypeAlias = Callable[[], None]


class DeferredWeightGradients:
    """Work by (segment, micro batch): collected while B runs, carried out by W, in the same order.

    What a piece of work refers to (a layer's input, the gradient of its output) is kept until it has run;
    everything else of the forward pass is released by B as usual.
    """

    def __init__(self) -> None:
        self._kept: ActivationStore[deque[Work]] = ActivationStore()
        self._open: deque[Work] | None = None

    def __len__(self) -> int:
        """Number of (segment, micro batch) pairs that wait for their W."""
        return len(self._kept)

    @contextmanager
    def collect(self, key: Key) -> Iterator[None]:
        """Keep what is added inside for the W of ``key``."""
        assert self._open is None, "one B at a time"
        self._open = deque()
        try:
            yield
            self._kept.put(key, self._open)
        finally:
            self._open = None

    def add(self, work: Work) -> None:
        """Leave ``work`` for W, or carry it out now if no B is collecting: the plan then has no W."""
        if self._open is None:
            work()
        else:
            self._open.append(work)

    def run(self, key: Key) -> None:
        """The W of ``key``; each piece of work is forgotten, with its tensors, once it is done."""
        pieces = self._kept.take(key)
        while pieces:
            pieces.popleft()()

    def assert_empty(self) -> None:
        """Every B was followed by its W."""
        self._kept.assert_empty()
