"""Layers of each stage of 1F1B, so that the one with the head takes no longer than the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from helixpipe.elastic.costs.chunk_costs import ChunkCosts


def balanced_stage_layers(
    lengths: Sequence[int], costs: ChunkCosts, num_layers: int, num_stages: int
) -> tuple[int, ...]:
    """The layers of each stage whose slowest stage takes the shortest; empty for as many in each.

    As Megatron places them: the stages between the first and the last have as many each.

    Args:
        lengths: tokens of the sequences that are trained on, for the shares of attention and head.
        costs: what they take.
        num_layers: of the model, a multiple of ``num_stages``.
        num_stages: pipeline-parallel size.
    """
    layer_ms = sum(costs.layer_ms(length * length, length) for length in lengths)
    per_token = (costs.forward.head_ms + costs.backward.head_ms) / costs.tensor_parallel
    head_ms = per_token * sum(lengths)

    def slowest_ms(counts: Sequence[int]) -> float:
        return max(*(count * layer_ms for count in counts), counts[-1] * layer_ms + head_ms)

    even = (num_layers // num_stages,) * num_stages
    # Of equals the even one, else that with the fewest layers on the first stage, which keeps the most.
    best = min(
        (even, *_uneven(num_layers, num_stages)),
        key=lambda counts: (slowest_ms(counts), counts != even, counts[0]),
    )
    return () if best == even else best


def _uneven(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """Every number of layers of the first and the last stage that leaves as many for each between them."""
    if num_stages == 1:
        return
    for first in range(1, num_layers):
        for last in range(1, num_layers - first + 1):
            rest, between = num_layers - first - last, num_stages - 2
            if between == 0 and rest == 0:
                yield first, last
            elif between and rest and rest % between == 0:
                yield first, *(rest // between,) * between, last
