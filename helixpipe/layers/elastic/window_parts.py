"""What a window leaves of attention to an earlier slice, in parts that every backend computes.

A query sees the keys of an earlier slice that are fewer tokens before it than the window has. First queries
may see all of them; the others see a trapezoid, which is a triangle and, behind it, a rectangle. The triangle
is causal once its queries and keys are read backwards: then the later keys are the earlier ones.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from helixpipe.layers.attention.interface import AttentionBackend, ForwardResult, Gradients


class WindowPart(NamedTuple):
    """Queries of a slice, and keys of an earlier one.

    Attributes:
        queries, keys: which of them.
        is_whole: every query sees every key; else as many of both, and a query sees the keys from its own
            place on.
    """

    queries: slice
    keys: slice
    is_whole: bool

    def behind(self, count: int) -> WindowPart:
        """The same part of an earlier slice with so many keys before those that it counts."""
        last = None if self.keys.stop is None else self.keys.stop + count
        return self._replace(keys=slice((self.keys.start or 0) + count, last)) if count else self

    def forward(
        self, backend: AttentionBackend, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> ForwardResult:
        """Output and log-sum-exp of the part's queries over its keys; all are given."""
        own = self._read(query, key, value)
        if self.is_whole:
            return backend.forward(*own, scale, causal=False)
        found = backend.forward(*own, scale)
        return ForwardResult(found.output.flip(2), found.log_sum_exp.flip(2), found.extra)

    def backward(
        self,
        backend: AttentionBackend,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        result: ForwardResult,
        scale: float,
    ) -> Gradients:
        """Gradients of the part's queries, keys and values.

        ``result`` has output and log-sum-exp of all queries over all keys, and what the forward pass of this
        part left.
        """
        output, log_sum_exp = rows(result.output, self.queries), rows(result.log_sum_exp, self.queries)
        grad, own = rows(grad, self.queries), self._read(query, key, value)
        if self.is_whole:
            result = ForwardResult(output, log_sum_exp, result.extra)
            return backend.backward(grad, *own, result, scale, causal=False)
        result = ForwardResult(output.flip(2), log_sum_exp.flip(2), result.extra)
        of_query, of_key, of_value = backend.backward(grad.flip(2), *own, result, scale)
        return of_query.flip(2), of_key.flip(2), of_value.flip(2)

    def _read(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = rows(query, self.queries), rows(key, self.keys), rows(value, self.keys)
        return own if self.is_whole else (own[0].flip(2), own[1].flip(2), own[2].flip(2))


_ALL = slice(None)


def rows(tensor: Tensor, which: slice) -> Tensor:
    """Some tokens of [1, heads, s, d] or [1, heads, s], a view; without one where all are meant."""
    return tensor if which == _ALL else tensor[:, :, which]


def window_parts(num_queries: int, num_keys: int, distance: int, window: int) -> list[WindowPart]:
    """The parts of attention to an earlier slice; none if it lies outside of the window.

    Args:
        num_queries: of the slice.
        num_keys: of the earlier one.
        distance: tokens from the first key to the first query.
        window: how many tokens a query sees, its own included; 0 for all before it.
    """
    if not window:
        return [WindowPart(_ALL, _ALL, True)]
    # Query i sees key j from i + first on.
    first = distance - window + 1
    whole = max(0, min(num_queries, 1 - first))
    last = max(whole, min(num_queries, num_keys - first))
    parts = []
    if whole:
        parts.append(WindowPart(slice(0, whole), slice(0, num_keys), True))
    if last > whole:
        triangle = slice(whole + first, last + first)
        parts.append(WindowPart(slice(whole, last), triangle, False))
        if triangle.stop < num_keys:
            parts.append(WindowPart(slice(whole, last), slice(triangle.stop, num_keys), True))
    return parts
