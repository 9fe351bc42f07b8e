"""Recipes: what an elastic iteration does beside its plan's order, with a JSON form."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from helixpipe.elastic.chunks import Chunk, Piece
from helixpipe.json_input import parse_json
from helixpipe.plan.stage_layers import stage_counts


@dataclass(frozen=True)
class BatchRecipe(ABC):
    """Which tokens each micro batch of a plan holds.

    Attributes:
        chunks: in the order of their forwards; micro batch i of the plan is ``chunks[i]``.
    """

    chunks: tuple[Chunk, ...]

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """How many consecutive chunks each pipeline or round has, which follow one another."""

    @abstractmethod
    def _others(self) -> dict[str, Any]:
        """What a recipe says beside its chunks, as values of JSON."""

    @cached_property
    def ranges(self) -> tuple[range, ...]:
        """The chunks of each pipeline or round."""
        ends = accumulate(self.sizes, initial=0)
        return tuple(range(first, last) for first, last in pairwise(ends))

    @cached_property
    def slices(self) -> tuple[tuple[int, ...], ...]:
        """Groups of chunks that carry consecutive slices of one sequence."""
        return slice_groups(self.chunks)

    def to_dict(self) -> dict[str, Any]:
        """As values of JSON; a piece is [sequence, start, length]."""
        lengths = {piece.sequence: piece.sequence_length for c in self.chunks for piece in c.pieces}
        return {
            "sequence_lengths": [lengths[sequence] for sequence in range(len(lengths))],
            "chunks": [[[p.sequence, p.start, p.length] for p in chunk.pieces] for chunk in self.chunks],
            **self._others(),
        }

    def to_json(self) -> str:
        """Read back by ``from_json`` of its class."""
        return json.dumps(self.to_dict()) + "\n"

    def check(self, lengths: Sequence[int]) -> None:
        """``ValueError`` unless every token of a batch of ``lengths`` is in exactly one chunk."""
        missing = _uncovered(self.chunks, lengths)
        if missing is not None:
            raise ValueError(f"not a recipe: the tokens of sequence {missing} are not in one chunk each")


@dataclass(frozen=True)
class Recipe(BatchRecipe):
    """The chunks of 1F1B pipelines, and what of them is computed twice.

    Attributes:
        pipelines: how many consecutive chunks each 1F1B pipeline has; pipelines run back to back.
        checkpointed: ``checkpointed[stage][chunk]`` layers, the stage's first ones, keep only their input.
        stage_layers: layers of each stage, where they differ; empty for as many in each.
    """

    pipelines: tuple[int, ...]
    checkpointed: tuple[tuple[int, ...], ...]
    stage_layers: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """See :class:`BatchRecipe`."""
        return self.pipelines

    def layers_by_stage(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each stage of a model of ``num_layers``."""
        return stage_counts(self.stage_layers, num_layers, len(self.checkpointed))

    def _others(self) -> dict[str, Any]:
        uneven = {"stage_layers": list(self.stage_layers)} if self.stage_layers else {}
        return {
            "pipelines": list(self.pipelines),
            "checkpointed": [list(row) for row in self.checkpointed],
            **uneven,
        }

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read a recipe; ``ValueError`` if it is none, or does not hold every token once."""
        return cls.from_dict(parse_json(text, "not a recipe"))

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Read the form of :meth:`to_dict`; ``ValueError`` as for :meth:`from_json`."""
        lengths, chunks = read_chunks(data)
        for chunk in chunks:
            if not all(piece.is_whole for piece in chunk.pieces[1:]):
                raise ValueError("not a recipe: a chunk holds at most one slice, which comes first")
        recipe = cls(
            chunks,
            tuple(whole_numbers(data, "pipelines")),
            tuple(
                tuple(whole_numbers({"checkpointed": row}, "checkpointed"))
                for row in list_of(data.get("checkpointed"), "checkpointed")
            ),
            tuple(whole_numbers(data, "stage_layers")) if "stage_layers" in data else (),
        )
        recipe.check(lengths)
        return recipe

    def check(self, lengths: Sequence[int]) -> None:
        """``ValueError`` unless every token of a batch of ``lengths`` is in exactly one chunk."""
        super().check(lengths)
        if sum(self.pipelines) != len(self.chunks) or min(self.pipelines, default=0) < 1:
            raise ValueError(
                f"not a recipe: pipelines {list(self.pipelines)} do not add up to {len(self.chunks)} chunks"
            )
        if not self.checkpointed or any(len(row) != len(self.chunks) for row in self.checkpointed):
            raise ValueError(f"not a recipe: checkpointed needs {len(self.chunks)} numbers for every stage")
        layers = self.stage_layers
        if layers and (len(layers) != len(self.checkpointed) or min(layers) < 1):
            raise ValueError(
                f"not a recipe: stage_layers {list(layers)} are not one or more layers for each of "
                f"{len(self.checkpointed)} stages"
            )


def read_chunks(data: Any) -> tuple[list[int], tuple[Chunk, ...]]:
    """Sequences' lengths and chunks of the form of :meth:`BatchRecipe.to_dict`; ``ValueError`` if wrong."""
    if not isinstance(data, dict):
        raise ValueError("not a recipe: expected an object")
    lengths = whole_numbers(data, "sequence_lengths")
    chunks = tuple(
        _chunk([_piece(piece, lengths) for piece in list_of(pieces, "chunks")])
        for pieces in list_of(data.get("chunks"), "chunks")
    )
    return lengths, chunks


def slice_groups(chunks: Sequence[Chunk]) -> tuple[tuple[int, ...], ...]:
    """Indices of the chunks that hold each cut sequence, ordered by the first."""
    groups: dict[int, list[int]] = {}
    for index, chunk in enumerate(chunks):
        for sequence in chunk.sliced_sequences:
            groups.setdefault(sequence, []).append(index)
    return tuple(tuple(group) for group in groups.values())


def _uncovered(chunks: Iterable[Chunk], lengths: Sequence[int]) -> int | None:
    """A sequence whose tokens are not in one chunk each, in the order of chunks; None if there is none."""
    covered = dict.fromkeys(range(len(lengths)), 0)
    for chunk in chunks:
        for piece in chunk.pieces:
            if piece.start != covered.get(piece.sequence):
                return piece.sequence
            covered[piece.sequence] += piece.length
    return next((i for i, length in enumerate(lengths) if covered[i] != length), None)


def _piece(found: Any, lengths: Sequence[int]) -> Piece:
    sequence, start, length = _triple(found)
    if sequence >= len(lengths) or length < 1 or start + length > lengths[sequence]:
        raise ValueError(f"not a recipe: {found} is no part of a sequence")
    return Piece(sequence, start, length, lengths[sequence])


def _chunk(pieces: Sequence[Piece]) -> Chunk:
    is_possible = (
        bool(pieces)
        and all(piece.start == 0 for piece in pieces[1:])
        and not any(piece.is_continued for piece in pieces[:-1])
    )
    if not is_possible:
        raise ValueError(
            "not a recipe: a chunk holds one slice, or whole sequences after the last slice of another and "
            "before the first of a third, and is not empty"
        )
    return Chunk(tuple(pieces))


def _triple(found: Any) -> tuple[int, int, int]:
    if isinstance(found, list) and len(found) == 3 and all(type(n) is int and n >= 0 for n in found):
        return found[0], found[1], found[2]
    raise ValueError(f"not a recipe: a piece is [sequence, start, length], found {found!r:.60}")


def list_of(found: Any, key: str) -> list[Any]:
    """A list; ``ValueError`` that names the key if it is none."""
    if not isinstance(found, list):
        raise ValueError(f'not a recipe: "{key}" must be a list, found {found!r:.60}')
    return found


def whole_numbers(data: Mapping[str, Any], key: str) -> list[int]:
    """A list of whole numbers that are not negative; ``ValueError`` that names the key if it is none."""
    values = list_of(data.get(key), key)
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f'not a recipe: "{key}" must hold whole numbers that are not negative')
    return values
