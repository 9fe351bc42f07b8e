"""Sizes of chunks: for how many tokens the MLP, or the loss, is computed at a time."""

from __future__ import annotations

# Matrix products of fewer tokens are slower per token.
_FEWEST_TOKENS = 1024


def automatic_size(num_tokens: int, width: int, hidden_size: int) -> int:
    """Tokens of a slice whose widest tensor is no larger than the whole hidden state, nor very small.

    Args:
        num_tokens: of the sequence.
        width: of the widest tensor, in elements per token on one GPU.
        hidden_size: width of the hidden state on one GPU.
    """
    return min(num_tokens, max(_FEWEST_TOKENS, num_tokens * hidden_size // width))
