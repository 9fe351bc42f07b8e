"""A batch of documents of different lengths with the plan that was made for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from helixpipe.elastic import Chunk, ElasticPlan, Piece
from helixpipe.elastic.elastic_plan import plan_of
from helixpipe.elastic.recipe import BatchRecipe
from helixpipe.layers.elastic.layout import padded_length
from helixpipe.plan import Plan
from helixpipe.plan.build import complete

ChunkTensors = dict[str, Tensor]


class ElasticBatch:
    """What one call of the elastic ``forward_backward_func`` trains on.

    Args:
        plan: of this batch; its chunks name sequences by their index. A recipe alone does, too: its plan
            follows from it.
        sequences: the documents of this data-parallel replica, on the CPU, each [n + 1] token ids of which
            the last is only a label; n is the sequence's length in the plan. The same on all of its ranks.
        loss_masks: [n] of every sequence, true or one where there is loss on ``sequence[t + 1]``; None for
            loss on all.

    Raises:
        ValueError: sequences or masks that are not those of the plan.
    """

    def __init__(
        self,
        plan: ElasticPlan | BatchRecipe,
        sequences: Sequence[Tensor],
        loss_masks: Sequence[Tensor] | None = None,
    ) -> None:
        self.recipe = plan.recipe if isinstance(plan, ElasticPlan) else plan
        self.sequences = tuple(sequences)
        self.loss_masks = None if loss_masks is None else tuple(loss_masks)
        self._plan = plan.plan if isinstance(plan, ElasticPlan) else None
        for index, sequence in enumerate(self.sequences):
            if sequence.dim() != 1 or sequence.dtype != torch.long or sequence.is_cuda or len(sequence) < 2:
                raise ValueError(
                    f"sequence {index} must be at least 2 token ids, one-dimensional and torch.long on the "
                    f"CPU, found {tuple(sequence.shape)} {sequence.dtype} on {sequence.device}"
                )
        self._check_lengths()
        if self.loss_masks is not None:
            _check_masks(self.sequences, self.loss_masks)

    def _check_lengths(self) -> None:
        planned = {piece.sequence: piece.sequence_length for c in self.recipe.chunks for piece in c.pieces}
        lengths = {index: len(sequence) - 1 for index, sequence in enumerate(self.sequences)}
        if planned != lengths:
            wrong = min(index for index in planned | lengths if planned.get(index) != lengths.get(index))
            raise ValueError(
                f"the plan is not that of this batch: sequence {wrong} has {lengths.get(wrong, 'no')} tokens "
                f"to train on (one less than its ids), the plan has {planned.get(wrong, 'none')}"
            )
        self.recipe.check([lengths[index] for index in range(len(lengths))])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of plan and tokens, which the ranks of a replica compare before their first message."""
        found = hashlib.sha256(self.recipe.to_json().encode())
        if self._plan is not None:
            found.update(self._plan.to_json().encode())
        for sequence in self.sequences:
            found.update(sequence.contiguous().numpy().data)
        for mask in self.loss_masks or ():
            found.update(mask.bool().contiguous().numpy().data)
        return found.hexdigest()

    def plan(self, num_layers: int) -> Plan:
        """The lowered plan for a model of ``num_layers`` layers."""
        return complete(plan_of(self.recipe, num_layers)) if self._plan is None else self._plan

    def assemble(self, multiple: int, device: torch.device) -> list[ChunkTensors]:
        """``tokens``, ``labels``, ``loss_mask`` and ``position_ids`` of every chunk, [1, T] each.

        T is the chunk's tokens rounded up to a ``multiple``; the padding is at the end and masked. One copy
        brings all of the batch to ``device``.
        """
        chunks = self.recipe.chunks
        lengths = [padded_length(chunk.tokens, multiple) for chunk in chunks]
        columns = [
            torch.nn.functional.pad(self._rows(chunk), (0, length - chunk.tokens))
            for chunk, length in zip(chunks, lengths, strict=True)
        ]
        whole = torch.cat(columns, dim=1)
        if device.type == "cuda":
            whole = whole.pin_memory().to(device, non_blocking=True)
        parts = whole.split(lengths, dim=1)
        return [
            {
                "tokens": part[0:1],
                "labels": part[1:2],
                "position_ids": part[2:3],
                "loss_mask": part[3:4].float(),
            }
            for part in parts
        ]

    def _rows(self, chunk: Chunk) -> Tensor:
        """Tokens, labels, positions and loss mask, [4, chunk.tokens]."""
        rows = zip(*(self._columns(piece) for piece in chunk.pieces), strict=True)
        return torch.stack([torch.cat(parts) for parts in rows])

    def _columns(self, piece: Piece) -> tuple[Tensor, ...]:
        end = piece.start + piece.length
        ids = self.sequences[piece.sequence]
        if self.loss_masks is None:
            mask = torch.ones(piece.length, dtype=torch.long)
        else:
            mask = self.loss_masks[piece.sequence][piece.start : end].long()
        return ids[piece.start : end], ids[piece.start + 1 : end + 1], torch.arange(piece.start, end), mask


def _check_masks(sequences: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    found, wanted = [tuple(mask.shape) for mask in masks], [(len(ids) - 1,) for ids in sequences]
    if found != wanted:
        raise ValueError(
            "each sequence needs a loss mask that is one shorter than its ids; found masks of shapes "
            f"{found!s:.60} for {wanted!s:.60}"
        )
