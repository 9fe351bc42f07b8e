"""What each piece of a layer keeps for its backward, and computes again, under each way of recomputing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from typing import NamedTuple

from helixpipe.plan.cost_model.work import LAYER_PIECES


class Recompute(str, Enum):
    """What a backward computes again instead of having kept it.

    ``PRODUCTS`` keeps the results of matrix products and of attention, and computes norms, rotary positions
    and activation functions again. ``SELECTIVE`` is Megatron's core attention; ``WITHOUT_ATTENTION`` is what
    is cheap: attention's output and log-sum-exp are kept (HelixPipe); ``FULL`` keeps only a segment's or
    layer's input.
    """

    NONE = "none"
    PRODUCTS = "products"
    SELECTIVE = "selective"
    WITHOUT_ATTENTION = "without-attention"
    FULL = "full"


# What a backward under ``PRODUCTS`` computes again of the piece fc1: all but its product.
ACTIVATION = "activation"


class Part(NamedTuple):
    """A run of pieces on one rank: what its forward keeps and its backward recomputes.

    ``recomputed`` holds pieces, or ``ACTIVATION`` for what follows the product of fc1. ``core_share`` is what
    a window leaves of attention, ``mlp_share`` what the MLP's width is of the widest.
    """

    pieces: tuple[str, ...]
    kept: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    core_share: float = 1.0
    mlp_share: float = 1.0


_MLP_KEPT = ("norm2 input", "norm2 output", "fc1 output", "activation")
_ATTENTION_KEPT = ("norm1 input", "norm1 output", "qkv", "attention output", "log-sum-exp")
_MLP_PRODUCTS = ("norm2 input", "fc1 output")
_ATTENTION_PRODUCTS = ("norm1 input", "qkv", "attention output", "log-sum-exp")


def _without(names: Iterable[str], *left_out: str) -> tuple[str, ...]:
    return tuple(name for name in names if name not in left_out)


@cache
def whole_layer(recompute: Recompute) -> Part:
    """A layer on one rank."""
    if recompute is Recompute.PRODUCTS:
        again = ("norm1", "norm2", ACTIVATION)
        return Part(LAYER_PIECES, _ATTENTION_PRODUCTS + _MLP_PRODUCTS, again)
    if recompute is Recompute.FULL:
        return Part(LAYER_PIECES, ("norm1 input",), LAYER_PIECES)
    if recompute is Recompute.WITHOUT_ATTENTION:
        kept = ("norm1 input", "attention output", "log-sum-exp", "norm2 input")
        return Part(LAYER_PIECES, kept, ("norm1", "qkv", "norm2", "fc1"))
    if recompute is Recompute.SELECTIVE:
        return Part(LAYER_PIECES, _without(_ATTENTION_KEPT, "log-sum-exp") + _MLP_KEPT, ("core",))
    return Part(LAYER_PIECES, _ATTENTION_KEPT + _MLP_KEPT)


@cache
def in_chunks(part: Part) -> Part:
    """The part if its MLP runs in chunks: of norm2 and MLP it keeps their input, and computes them again."""
    if "fc1" not in part.pieces:
        return part
    kept = _without(part.kept, "norm2 output", "fc1 output", "activation")
    if "fc2" in part.recomputed:
        # Once with all of the layer, once more chunk by chunk.
        return part._replace(kept=kept, recomputed=(*part.recomputed, "norm2", "fc1"))
    again = _without(part.recomputed, "norm2", "fc1", ACTIVATION)
    return part._replace(kept=kept, recomputed=(*again, "norm2", "fc1"))


class Cut(NamedTuple):
    """A layer cut around its attention range, and the tensors that cross the two cuts."""

    pre: Part
    attention: Part
    post: Part
    into: tuple[str, ...]
    out: tuple[str, ...]


@cache
def cut(attention_range: str, recompute: Recompute) -> Cut:
    """A layer cut around an attention range."""
    return {"core": _cut_core, "qkv": _cut_qkv, "block": _cut_block}[attention_range](recompute)


class SplitCut(NamedTuple):
    """A layer whose attention range is cut once more, between QKV and attention."""

    pre: Part
    qkv: Part
    attention: Part
    post: Part
    into: tuple[str, ...]
    out: tuple[str, ...]


@cache
def split_cut(attention_range: str, recompute: Recompute) -> SplitCut:
    """A layer cut around ``qkv`` or ``block``, with QKV apart.

    Attention keeps its q, k and v: its backward comes first, and later slices read k and v.
    """
    core, whole = cut("core", recompute), cut(attention_range, recompute)
    attention = core.attention
    if attention_range == "block":
        again = ("core", "proj") if recompute is Recompute.FULL else attention.recomputed
        attention = attention._replace(pieces=("core", "proj"), recomputed=again)
    return SplitCut(whole.pre, core.pre, attention, whole.post, whole.into, whole.out)


def _cut_core(recompute: Recompute) -> Cut:
    # The residual passes by attention in the same message, which is cut off behind the rest afterwards.
    kept: tuple[str, ...] = ("qkv", "attention output", "log-sum-exp")
    again: tuple[str, ...] = ()
    if recompute in (Recompute.SELECTIVE, Recompute.FULL):
        kept, again = ("qkv",), ("core",)
    pre = {
        **dict.fromkeys(
            (Recompute.PRODUCTS, Recompute.WITHOUT_ATTENTION),
            Part(("norm1", "qkv"), ("norm1 input",), ("norm1",)),
        ),
        Recompute.FULL: Part(("norm1", "qkv"), (), ("norm1", "qkv")),
    }.get(recompute, Part(("norm1", "qkv"), ("norm1 input", "norm1 output")))
    attention = Part(("core",), kept, again)
    return Cut(pre, attention, _post(recompute), ("qkv", "residual"), ("attention output", "residual"))


def _cut_qkv(recompute: Recompute) -> Cut:
    attention = _attention_with_weights(("norm1", "qkv", "core"), recompute)
    return Cut(Part(()), attention, _post(recompute), ("norm1 input",), ("attention output", "residual"))


def _cut_block(recompute: Recompute) -> Cut:
    mlp = ("norm2", "fc1", "fc2")
    post = {
        Recompute.PRODUCTS: Part(mlp, _MLP_PRODUCTS, ("norm2", ACTIVATION)),
        Recompute.WITHOUT_ATTENTION: Part(mlp, ("norm2 input",), ("norm2", "fc1")),
        Recompute.FULL: Part(mlp, ("norm2 input",), mlp),
    }.get(recompute, Part(mlp, _MLP_KEPT))
    attention = _attention_with_weights(("norm1", "qkv", "core", "proj"), recompute)
    return Cut(Part(()), attention, post, ("norm1 input",), ("norm2 input",))


def _attention_with_weights(pieces: tuple[str, ...], recompute: Recompute) -> Part:
    """An attention segment that starts from the hidden state, with weights that it may have borrowed."""
    return {
        Recompute.NONE: Part(pieces, _ATTENTION_KEPT),
        Recompute.PRODUCTS: Part(pieces, _ATTENTION_PRODUCTS, ("norm1",)),
        Recompute.SELECTIVE: Part(pieces, _without(_ATTENTION_KEPT, "log-sum-exp"), ("core",)),
        Recompute.WITHOUT_ATTENTION: Part(
            pieces, ("norm1 input", "attention output", "log-sum-exp"), ("norm1", "qkv")
        ),
        Recompute.FULL: Part(pieces, ("norm1 input",), pieces),
    }[recompute]


def _post(recompute: Recompute) -> Part:
    pieces = ("proj", "norm2", "fc1", "fc2")
    if recompute is Recompute.PRODUCTS:
        return Part(pieces, ("attention output", *_MLP_PRODUCTS), ("norm2", ACTIVATION))
    if recompute is Recompute.FULL:
        return Part(pieces, ("attention output", "residual"), pieces)
    if recompute is Recompute.WITHOUT_ATTENTION:
        return Part(pieces, ("attention output", "norm2 input"), ("norm2", "fc1"))
    return Part(pieces, ("attention output", *_MLP_KEPT))


# Inputs of matrix products and gradients of their outputs: what weight gradients are computed from.
FOR_WEIGHT: Mapping[str, tuple[str, ...]] = {
    "qkv": ("norm1 output", "qkv"),
    "proj": ("attention output", "residual"),
    "fc1": ("norm2 output", "fc1 output"),
    "fc2": ("activation", "residual"),
}
