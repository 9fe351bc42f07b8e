"""Rules from tensors on Hugging Face to ours and back; each moves numbers and computes none.

Ours are in the layout of Megatron's checkpoints, as Megatron-Bridge writes them: QKV by groups, each with its
queries, then its key and its value; the gate of a gated MLP before the other half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]

LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Rule:
    """How one tensor of ours is made of one or more of theirs.

    Attributes:
        ours: name in a checkpoint of ours, where those of layers that are all alike, and of experts in them,
            are stacked.
        theirs: names on Hugging Face, with ``{}`` for the layer's number, and for the expert's after it.
        join: theirs to ours, of one layer or expert. It takes tensors on the ``meta`` device, too.
        split: ours to theirs.
        num_experts: of a layer, each of which has such a tensor; None for one of the layer.
        layer: the only one that has it, where layers differ; None for all, or a tensor of the model.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Tensors], Tensor]
    split: Callable[[Tensor], Tensors]
    num_experts: int | None = None
    layer: int | None = None

    def sizes(self, num_layers: int) -> dict[str, int]:
        """How many are stacked, of ``layers`` and of ``experts`` in each; empty for a tensor by itself."""
        is_of_all = self.layer is None and self.ours.startswith(LAYERS)
        found = {"layers": num_layers} if is_of_all else {}
        return found if self.num_experts is None else {**found, "experts": self.num_experts}

    def names(self, *numbers: int) -> tuple[str, ...]:
        """Theirs, of one of those that are stacked."""
        place = numbers if self.layer is None else (self.layer, *numbers)
        return tuple(name.format(*place) for name in self.theirs)

    def of_layer(self, layer: int) -> Rule:
        """The same rule for one layer, which a checkpoint has under its number."""
        assert self.ours.startswith(LAYERS)
        return replace(self, ours=f"{LAYERS}{layer}.{self.ours.removeprefix(LAYERS)}", layer=layer)

    def of_experts(self, num_experts: int) -> Rule:
        """The same rule for every expert of a layer."""
        return replace(self, num_experts=num_experts)


def same(ours: str, theirs: str) -> Rule:
    """The same tensor under another name."""
    return Rule(ours, (theirs,), lambda given: given[0], lambda tensor: (tensor,))


def transposed(ours: str, theirs: str) -> Rule:
    """A matrix, or one for each expert, that is stored as [in, out]."""
    return Rule(ours, (theirs,), lambda given: given[0].mT, lambda tensor: (tensor.mT,))


def alternating(ours: str, theirs: str) -> Rule:
    """Experts' gates and what they multiply, which take turns there along the last dimension.

    Weights are [experts, in, 2 * out] there and [experts, 2 * out, in] here, biases [experts, 2 * out].
    """

    def join(given: Tensors) -> Tensor:
        by_pairs: Tensor = given[0].movedim(-1, 1).unflatten(1, (-1, 2))
        return by_pairs.transpose(1, 2).flatten(1, 2)

    def split(tensor: Tensor) -> Tensors:
        by_pairs: Tensor = tensor.unflatten(1, (2, -1)).transpose(1, 2)
        return (by_pairs.flatten(1, 2).movedim(1, -1),)

    return Rule(ours, (theirs,), join, split)


def stacked(ours: str, *theirs: str) -> Rule:
    """Tensors of one size, one after the other along the first dimension."""
    return Rule(ours, theirs, torch.cat, lambda tensor: tensor.chunk(len(theirs)))


def grouped(ours: str, theirs: tuple[str, str, str], heads: int, groups: int) -> Rule:
    """Queries, keys and values, [heads * d, ...] and twice [groups * d, ...], by groups.

    Args:
        ours: name of QKV's weight or bias.
        theirs: names of the three.
        heads, groups: of queries, and of keys and values.
    """
    shared = heads // groups

    def join(given: Tensors) -> Tensor:
        return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in given], dim=1).flatten(0, 1)

    def split(tensor: Tensor) -> Tensors:
        parts = tensor.unflatten(0, (groups, shared + 2, -1))
        query, key, value = parts.split((shared, 1, 1), dim=1)
        return tuple(part.flatten(0, 2) for part in (query, key, value))

    return Rule(ours, theirs, join, split)


def grouped_whole(ours: str, theirs: str, heads: int) -> Rule:
    """Queries, keys and values of as many heads, which are one tensor, by groups.

    Weights are [in, 3 * heads * d] there, biases [3 * heads * d].
    """

    def join(given: Tensors) -> Tensor:
        by_groups: Tensor = given[0].t().unflatten(0, (3, heads, -1)).transpose(0, 1)
        return by_groups.flatten(0, 2)

    def split(tensor: Tensor) -> Tensors:
        return (tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2).t(),)

    return Rule(ours, (theirs,), join, split)


def padded(ours: str, theirs: str, rows: int, padded_rows: int) -> Rule:
    """A table of ``rows`` rows, which has rows of zeros after them here."""

    def join(given: Tensors) -> Tensor:
        return torch.nn.functional.pad(given[0], (0, 0, 0, padded_rows - rows))

    return same(ours, theirs) if rows == padded_rows else Rule(ours, (theirs,), join, lambda t: (t[:rows],))


def by_layer(
    has_experts: Sequence[int], with_experts: Iterable[Rule], dense: Iterable[Rule]
) -> tuple[Rule, ...]:
    """Rules of a model some of whose layers have experts; its checkpoints number layers, as Megatron's do.

    Args:
        has_experts: of each layer.
        with_experts, dense: rules of a model all of whose layers are so.
    """
    kinds = tuple(dense), tuple(with_experts)
    of_model = [rule for rule in kinds[0] if not rule.ours.startswith(LAYERS)]
    of_layers = [
        rule.of_layer(layer)
        for layer, has in enumerate(has_experts)
        for rule in kinds[has]
        if rule.ours.startswith(LAYERS)
    ]
    return (*of_layers, *of_model)
