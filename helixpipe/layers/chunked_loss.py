"""Head and cross entropy over slices of the sequence: the logits of a micro batch never exist whole.

Per-token losses go to the caller's loss function, which weighs them as it likes; only the backward pass knows
the weights. A gradient of the head's weight that was summed up in the forward pass could not be weighed any
more (which is what Liger's fused linear cross entropy does, beside needing Triton and whole vocabularies), so
the backward pass computes each slice's logits again: one matrix product more to the head's three.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor
from torch.nn import Parameter

from helixpipe.layers.recomputing_layer import local_size
from helixpipe.layers.slices import SlicedFunction, in_slices


def chunked_loss(
    hidden: Tensor,
    labels: Tensor,
    output_layer: ColumnParallelLinear,
    weight: Parameter | None,
    loss: Callable[[Tensor, Tensor], Tensor],
    chunk_size: int,
) -> Tensor:
    """``loss(labels, output_layer(hidden))`` without the logits.

    Args:
        hidden: [s, b, h]; with sequence parallelism this rank's part, [s/tp, b, h].
        labels: [b, s].
        output_layer: the head, without a bias, marked by :func:`helixpipe.layers.slices.mark_sliced`.
        weight: of the embedding if the head is tied to it, else None.
        loss: Megatron's ``compute_language_model_loss``, on labels [b, n] and logits [n, b, vocab/tp].
        chunk_size: tokens of the sequence in a slice.

    Returns:
        Losses [b, s].
    """
    used = output_layer.weight if weight is None else weight
    # A slice is the same positions of every rank's part, which the head gathers one after the other.
    batch, num_parts = labels.shape[0], labels.shape[1] // hidden.shape[0]

    def losses_of(part: Tensor, labels: Tensor) -> Tensor:
        """[n, b, h] and labels [n, b, parts] -> losses [n, b, parts]."""
        logits, _ = output_layer(part, weight=weight)
        own = loss(labels.permute(1, 2, 0).reshape(batch, -1), logits)
        return own.view(batch, num_parts, -1).permute(2, 0, 1)

    function = SlicedFunction(losses_of, losses_of, (used,), local_size(chunk_size, output_layer.config))
    by_position = labels.view(batch, num_parts, -1).permute(2, 0, 1)
    return in_slices(function, hidden, by_position).permute(1, 2, 0).reshape(batch, -1)
