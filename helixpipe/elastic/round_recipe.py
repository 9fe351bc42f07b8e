"""The recipe of elastic helix: the chunks in the slots of its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

from helixpipe.elastic.recipe import BatchRecipe, list_of, read_chunks, whole_numbers
from helixpipe.plan.cost_model.recomputation import Recompute
from helixpipe.plan.schedules.helix import DEFAULT_ATTENTION_RANGE
from helixpipe.plan.schedules.request import ATTENTION_RANGES

Slots: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class RoundRecipe(BatchRecipe):
    """The chunks of rounds of helix, and what of them is computed again.

    Attributes:
        rounds: for each round how many consecutive chunks each slot has; one slot for every rank.
        recompute: the level, the same for all layers and chunks.
        attention_range: pieces that the attention rank runs.
    """

    rounds: tuple[Slots, ...]
    recompute: str
    attention_range: str = DEFAULT_ATTENTION_RANGE

    @property
    def sizes(self) -> tuple[int, ...]:
        """See :class:`BatchRecipe`."""
        return tuple(map(sum, self.rounds))

    @property
    def members(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The chunks of each slot of each round."""
        ends = pairwise(accumulate((size for slots in self.rounds for size in slots), initial=0))
        return tuple(tuple(tuple(range(*next(ends))) for _ in slots) for slots in self.rounds)

    def _others(self) -> dict[str, Any]:
        return {
            "rounds": [list(slots) for slots in self.rounds],
            "recompute": self.recompute,
            "attention_range": self.attention_range,
        }

    @classmethod
    def from_dict(cls, data: Any) -> RoundRecipe:
        """Read the form of :meth:`to_dict`; ``ValueError`` if it is none, or misses a token."""
        lengths, chunks = read_chunks(data)
        rounds = [whole_numbers({"rounds": row}, "rounds") for row in list_of(data.get("rounds"), "rounds")]
        recipe = cls(
            chunks,
            tuple(map(tuple, rounds)),
            str(data.get("recompute")),
            str(data.get("attention_range", DEFAULT_ATTENTION_RANGE)),
        )
        recipe.check(lengths)
        return recipe

    def check(self, lengths: Sequence[int]) -> None:
        """``ValueError`` unless every token of a batch is in one chunk, and every sequence in one round."""
        super().check(lengths)
        if len({len(slots) for slots in self.rounds}) != 1 or min(self.sizes) < 1:
            raise ValueError("not a recipe: every round has the same number of slots, and a chunk in one")
        if sum(self.sizes) != len(self.chunks):
            raise ValueError(
                f"not a recipe: rounds of {list(self.sizes)} chunks do not add up to {len(self.chunks)}"
            )
        known = [level.value for level in Recompute]
        if self.recompute not in known:
            raise ValueError(f"not a recipe: recompute {self.recompute!r} is none of {', '.join(known)}")
        if self.attention_range not in ATTENTION_RANGES:
            raise ValueError(
                f"not a recipe: attention_range {self.attention_range!r:.40} is none of "
                f"{', '.join(ATTENTION_RANGES)}"
            )
        round_of = {i: number for number, members in enumerate(self.ranges) for i in members}
        for group in self.slices:
            if group != tuple(range(group[0], group[-1] + 1)) or round_of[group[0]] != round_of[group[-1]]:
                raise ValueError(
                    "not a recipe: the slices of a sequence are in consecutive chunks of one round, those of "
                    f"chunks {', '.join(map(str, group))} are not"
                )
