"""Keys and values that slices on different ranks read, by the store in which attention finds them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from helixpipe.elastic.chunks import Piece
from helixpipe.layers.elastic.context import ContextStore, alone
from helixpipe.plan.context import Context
from helixpipe.plan.context_lifetime import Content, holdings
from helixpipe.plan.fit import segments_per_layer
from helixpipe.plan.plan import Plan
from helixpipe.runtime.executor import Tensors
from helixpipe.runtime.message import MessageLayout


class SliceContexts:
    """See :class:`helixpipe.runtime.context_lending.ContextLending`.

    Messages hold keys and values as segments return them, [T, b, groups, d]; the store has them as attention
    takes them, [b, groups, T, d].

    Args:
        plan: of slices, whose layers are cut at their attention.
        rank: this pipeline rank.
        pieces: the slice of each micro batch, of a chunk the piece that may be gone on with, its last.
        starts: at which token of its micro batch each piece begins.
        store: where attention looks for earlier slices.
        key_shape: of the keys of so many tokens.
        dtype: of keys and values.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        pieces: Sequence[Piece],
        starts: Sequence[int],
        store: ContextStore,
        key_shape: Callable[[int], torch.Size],
        dtype: torch.dtype,
    ) -> None:
        self._plan = plan
        self._pieces = pieces
        self._parts = [
            slice(start, start + piece.length) for start, piece in zip(starts, pieces, strict=True)
        ]
        self._store = store
        self._key_shape = key_shape
        self._dtype = dtype
        self._per_layer = segments_per_layer(plan)
        # By the micro batches that are gone on with, and by those that go on; one may be both, in two groups.
        self._gone_on_with = {i: group for group in plan.slices for i in group[:-1]}
        self._going_on = {i: group for group in plan.slices for i in group[1:]}
        # The same in every iteration over the plan, so made once.
        self._attended: dict[tuple[int, int], Piece] = {}
        self._returned: dict[tuple[int, int], list[Tensors]] = defaultdict(list)
        # Keys and values of slices that attend here, too, and how often they are still to be lent.
        self._own: dict[tuple[int, int], tuple[int, Tensor, Tensor]] = {}
        self._times_lent = Counter(
            (context.segment, i)
            for context in plan.contexts
            if context.owner == rank and plan.rank_of(context.segment, context.lent[0]) == rank
            for _ in range(2 if context.is_resent and plan.has_backward else 1)
            for i in context.lent
        )
        borrowed = {(c.segment, i) for c in plan.contexts if c.borrower == rank for i in c.lent}
        self._kept_here = {
            (holding.segment, i)
            for holding in holdings(plan, rank)
            if holding.content is Content.KEYS and holding.start.segment < holding.segment
            for i in holding.micro_batches
        } - borrowed

    def attended(self, segment: int, micro_batch: int) -> Piece:
        """A slice as attention on its rank sees it: nothing follows the last slice that attends there."""
        found = self._attended.get((segment, micro_batch))
        if found is None:
            found = self._pieces[micro_batch]
            group = self._gone_on_with.get(micro_batch)
            if group is not None:
                last = self._attending_here(segment, micro_batch, group)[-1]
                if last != group[-1]:
                    end = self._pieces[last].start + self._pieces[last].length
                    found = replace(found, sequence_length=end)
            self._attended[segment, micro_batch] = found
        return found

    def made(self, segment: int, micro_batch: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Note keys and values, [T, b, groups, d], that ``segment`` has made.

        Returns:
            The same, in tensors of their own if they are kept because they are read from here.
        """
        part = self._parts[micro_batch]
        times = self._times_lent[segment + 1, micro_batch]
        if times:
            self._own[segment + 1, micro_batch] = times, key.detach()[part], value.detach()[part]
        if (segment + 1, micro_batch) not in self._kept_here:
            return key, value
        key, value = alone(key), alone(value)
        pair = (alone(tensor.detach()[part]).permute(1, 2, 0, 3) for tensor in (key, value))
        self._store.keep(self._layer(segment + 1), self._pieces[micro_batch], *pair)
        return key, value

    def forget_own(self, segment: int, micro_batch: int) -> None:
        """Let go of a sequence's slices that attend here, where this was the last, in an evaluation."""
        group = self._going_on.get(micro_batch)
        if group is None:
            return
        here = self._attending_here(segment, micro_batch, group)
        if here[-1] == micro_batch:
            for i in here[:-1]:
                self._store.remove(self._layer(segment), self._pieces[i])

    def layout(self, context: Context) -> MessageLayout:
        """See :class:`helixpipe.runtime.context_lending.ContextLending`."""
        shapes = [self._key_shape(self._pieces[i].length) for i in context.lent for _ in range(2)]
        return MessageLayout(tuple(shapes), self._dtype)

    def lend(self, context: Context) -> Tensors:
        """See :class:`helixpipe.runtime.context_lending.ContextLending`."""
        return tuple(tensor for i in context.lent for tensor in self._to_lend(context.segment, i))

    def _to_lend(self, segment: int, micro_batch: int) -> Tensors:
        """Keys and values that are on this rank, [T, b, groups, d]."""
        if (segment, micro_batch) in self._own:
            times, key, value = self._own.pop((segment, micro_batch))
            if times > 1:
                self._own[segment, micro_batch] = times - 1, key, value
            return key, value
        kept = self._store.find(self._layer(segment), self._pieces[micro_batch])
        return kept.key.permute(2, 0, 1, 3), kept.value.permute(2, 0, 1, 3)

    def borrow(self, context: Context, tensors: Tensors) -> None:
        """See :class:`helixpipe.runtime.context_lending.ContextLending`."""
        for i, pair in _pairs(context, tensors):
            key, value = (tensor.permute(1, 2, 0, 3) for tensor in pair)
            self._store.keep(self._layer(context.segment), self._pieces[i], key, value)

    def drop(self, segment: int, micro_batches: Iterable[int]) -> None:
        """See :class:`helixpipe.runtime.context_lending.ContextLending`."""
        for i in micro_batches:
            if self._times_lent[segment, i]:
                continue  # It ends by itself, as it is lent for the last time.
            self._store.drop(self._layer(segment), self._pieces[i])

    def give_back(self, context: Context) -> Tensors:
        """See :class:`helixpipe.runtime.context_lending.ContextLending`; each sum is rounded once."""
        sums: list[Tensor] = []
        for i in context.lent:
            kept = self._store.remove(self._layer(context.segment), self._pieces[i])
            assert kept is not None
            for total in kept.sums():
                sums.append(total.to(self._dtype).permute(2, 0, 1, 3))
        return tuple(sums)

    def take_back(self, context: Context, gradients: Tensors) -> None:
        """See :class:`helixpipe.runtime.context_lending.ContextLending`."""
        for i, pair in _pairs(context, gradients):
            self._returned[context.segment, i].append(pair)

    def with_returned(self, segment: int, micro_batch: int, gradients: Tensors) -> Tensors:
        """See :class:`helixpipe.runtime.context_lending.ContextLending`.

        Args:
            segment: has made keys and values.
            micro_batch: of which slice.
            gradients: of query, key, value and residual.
        """
        query, key, value, residual = gradients
        added = self._returned.pop((segment + 1, micro_batch), [])
        kept = self._store.remove(self._layer(segment + 1), self._pieces[micro_batch])
        if kept is not None:
            own = tuple(total.permute(2, 0, 1, 3) for total in kept.sums())
            added = [own, *added]
        if not added:
            return gradients
        keys, values = zip(*added, strict=True)
        part = self._parts[micro_batch]
        return query, _sum(key, part, keys), _sum(value, part, values), residual

    def _attending_here(self, segment: int, micro_batch: int, group: Sequence[int]) -> list[int]:
        """Those of a sequence's micro batches that attend on the rank where ``micro_batch`` does."""
        rank = self._plan.rank_of(segment, micro_batch)
        return [i for i in group if self._plan.rank_of(segment, i) == rank]

    def _layer(self, segment: int) -> int:
        """The number of the layer that attends in ``segment``, from 1, as modules know it."""
        return (segment + 1) // self._per_layer

    def clear(self) -> None:
        """Forget what an iteration that failed has left."""
        self._own.clear()
        self._returned.clear()
        self._store.clear()

    def assert_empty(self) -> None:
        """See :class:`helixpipe.runtime.context_lending.ContextLending`."""
        self._store.assert_empty()
        assert not self._own, (
            f"keys and values that were not lent (segment, micro batch): {sorted(self._own)}"
        )
        assert not self._returned, f"gradients left (segment, micro batch): {sorted(self._returned)}"


def _pairs(context: Context, tensors: Tensors) -> Iterable[tuple[int, Tensors]]:
    """Key and value of each slice of a message."""
    return zip(context.lent, zip(tensors[::2], tensors[1::2], strict=True), strict=True)


def _sum(gradient: Tensor, part: slice, added: Sequence[Tensor]) -> Tensor:
    """The gradient with those of some of its tokens added, in fp32 or better, rounded once."""
    total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
    for other in added:
        total[part] += other
    return total.to(gradient.dtype)
