"""Which attention range moves the fewest bytes: activations travel per micro batch, weights per loan."""

from __future__ import annotations

from dataclasses import dataclass

from helixpipe.plan.schedules.request import ATTENTION_RANGES


@dataclass(frozen=True, kw_only=True)
class AttentionSizes:
    """What decides the messages of a layer whose attention runs on another rank; all sizes are one GPU's.

    Attributes:
        tokens: of a micro batch.
        residual_tokens: of those, the ones whose residual a GPU holds: fewer under sequence parallelism.
        hidden_size: h.
        query_size, kv_size: channels of its query heads, and of its key heads or value heads.
        element_bytes: of activations, their gradients and weights.
        gradient_bytes: of an element of a weight's gradient.
    """

    tokens: int
    residual_tokens: int
    hidden_size: int
    query_size: int
    kv_size: int
    element_bytes: int
    gradient_bytes: int


def slot_bytes(attention_range: str, sizes: AttentionSizes, num_fold: int) -> int:
    """Bytes of all messages, both directions, of one layer and one slot of ``num_fold`` micro batches."""
    residual = sizes.residual_tokens * sizes.hidden_size
    query, key = sizes.tokens * sizes.query_size, sizes.tokens * sizes.kv_size
    qkv_weights = sizes.hidden_size * (sizes.query_size + 2 * sizes.kv_size)
    # (activations to the attention rank and from it, weights to it)
    activations, weights = {
        "core": (query + 2 * key + residual + query + residual, 0),
        "qkv": (residual + query + residual, qkv_weights),
        "block": (2 * residual, qkv_weights + sizes.query_size * sizes.hidden_size),
    }[attention_range]
    moved = 2 * num_fold * activations * sizes.element_bytes
    return moved + weights * (sizes.element_bytes + sizes.gradient_bytes)


def cheapest_range(sizes: AttentionSizes, num_fold: int) -> str:
    """The attention range whose messages hold the fewest bytes; of equals, the one that lends least."""
    return min(ATTENTION_RANGES, key=lambda name: slot_bytes(name, sizes, num_fold))
