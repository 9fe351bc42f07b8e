"""The alternative: the pipeline's GPUs used for context parallelism instead.

Every GPU holds all layers and a share of each sequence. Ring attention passes keys and values around while
it computes (Liu et al. 2023, arXiv 2310.01889; balanced by giving each rank an early and a late part);
all-to-all exchanges the sequence for heads before and after attention (DeepSpeed-Ulysses, arXiv 2309.14509);
all-gather takes all keys and values before it starts (Llama 3, arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import NamedTuple

from helixpipe.plan.cost_model import PieceCost, Pieces, Recompute
from helixpipe.plan.cost_model.segments import whole_layer_cost
from helixpipe.plan.simulation.network import BYTES_PER_MS, Network

# Blocks of a ring are smaller than the whole triangle and their results are merged: Transformer Engine's ring
# attention reaches about 0.9 of the kernel's rate on the whole.
_RING_EFFICIENCY = 0.9


class Exchange(str, Enum):
    """How attention reaches the whole sequence."""

    RING = "context-parallel ring"
    ALL_TO_ALL = "context-parallel all-to-all"
    ALL_GATHER = "context-parallel all-gather"


class ContextParallel(NamedTuple):
    """What an iteration takes.

    Attributes:
        iteration_ms: with gradient reduction and optimizer.
        exposed_ms: of it, communication that nothing hides.
        peak_bytes: on each GPU.
    """

    iteration_ms: float
    exposed_ms: float
    peak_bytes: int


def predict_context_parallel(
    pieces: Pieces,
    exchange: Exchange,
    size: int,
    num_microbatches: int,
    recompute: Recompute,
    network: Network,
) -> ContextParallel:
    """Predict an iteration on ``size`` ranks that share each sequence.

    Args:
        pieces: costs of whole sequences.
        exchange: how attention reaches the whole sequence.
        size: context-parallel size.
        num_microbatches: per replica and iteration, one after the other.
        recompute: in every layer.
        network: links between the ranks that share a sequence.

    Raises:
        ValueError: heads that cannot be divided, for all-to-all.
    """
    model, workload = pieces.workload.model, pieces.workload
    if model.beside_dense:
        raise ValueError(
            "context parallelism of all GPUs is predicted for dense layers that attend to all tokens before, "
            f"not for {', '.join(model.beside_dense)}"
        )
    shared = share_sequence(pieces, exchange, size, network)
    links = _Links(pieces, network, size)
    layer = whole_layer_cost(pieces, recompute)
    core = pieces.times["core"]
    exposed_ms, slower_ms = 0.0, 0.0
    again = [core.forward] if recompute in (Recompute.SELECTIVE, Recompute.FULL) else []
    for attention_ms in (core.forward, *again, core.backward):
        tensors = 2 if attention_ms == core.backward else 1  # keys and values, and their gradients
        if exchange is Exchange.RING:
            slower_ms += attention_ms / size * (1 / _RING_EFFICIENCY - 1)
            exposed_ms += links.ring_ms(tensors, attention_ms / size / _RING_EFFICIENCY)
        elif exchange is Exchange.ALL_TO_ALL:
            exposed_ms += links.all_to_all_ms()
        else:
            exposed_ms += links.all_gather_ms(tensors)
    layer_ms = (layer.forward + layer.backward + layer.weight) / size + slower_ms + exposed_ms
    ends_ms = sum(pieces.times[name].total for name in ("embedding", "head")) / size
    counts = workload.parameters
    parameters = model.num_layers * sum(counts[name] for name in ("qkv", "proj", "fc1", "fc2"))
    parameters += counts["embedding"] + (0 if model.tied else counts["head"])
    finish_ms = shared.reduction_ms(parameters) + shared.optimizer_ms(parameters)
    transient = max(whole_layer_cost(shared, recompute).workspace_bytes, shared.workload.head_workspace_bytes)
    kept = model.num_layers * layer.bytes + workload.head_bytes
    return ContextParallel(
        iteration_ms=num_microbatches * (model.num_layers * layer_ms + ends_ms) + finish_ms,
        exposed_ms=num_microbatches * model.num_layers * exposed_ms,
        peak_bytes=shared.workload.static_bytes(parameters) + kept // size + transient,
    )


def share_sequence(pieces: Pieces, exchange: Exchange, size: int, network: Network) -> Pieces:
    """What pieces cost one rank of a stage whose ``size`` ranks share every sequence.

    Args:
        pieces: costs of whole sequences.
        exchange: how attention reaches the whole sequence.
        size: context-parallel size.
        network: links between the ranks that share a sequence.

    Raises:
        ValueError: sequences or heads that cannot be divided, or windows.
    """
    model, t = pieces.workload.model, pieces.workload.tensor_parallel
    gathers = exchange is Exchange.ALL_GATHER and size > 1
    shared = replace(pieces.workload, context_parallel=size, gathers_keys=gathers)
    if size > 1 and any(model.windows):
        raise ValueError("context parallelism is planned for attention to all tokens before, not for windows")
    if exchange is Exchange.ALL_TO_ALL and model.num_kv_heads % (t * size):
        raise ValueError(
            f"{model.num_kv_heads} key/value heads cannot be split over tensor-parallel size {t} x "
            f"context-parallel size {size}"
        )
    links = _Links(pieces, network, size)

    def attention(whole_ms: float, tensors: int) -> float:
        if exchange is Exchange.ALL_TO_ALL or size == 1:
            return whole_ms / size + links.all_to_all_ms()
        if exchange is Exchange.ALL_GATHER:
            return whole_ms / size + links.all_gather_ms(tensors)
        own_ms = whole_ms / size / _RING_EFFICIENCY
        return own_ms + links.ring_ms(tensors, own_ms)

    times = {
        name: PieceCost(cost.forward / size, cost.backward / size, cost.weight / size)
        for name, cost in pieces.times.items()
    }
    core = pieces.times["core"]
    times["core"] = PieceCost(attention(core.forward, 1), attention(core.backward, 2))
    return replace(
        pieces,
        times=times,
        workload=shared,
        reduction_gb_per_s=links.reduction_gb_per_s,
    )


class _Links:
    """Communication of one layer's attention in one direction, over the slowest links that it crosses."""

    def __init__(self, pieces: Pieces, network: Network, size: int) -> None:
        self.size = size
        self.model = pieces.workload.model
        self.channel_bytes = pieces.workload.tokens // size * pieces.workload.element_bytes
        crosses = 0 < network.ranks_per_node < size
        self.latency_ms = network.node_latency_ms if crosses else network.latency_ms
        self.gb_per_s = network.node_gb_per_s if crosses else network.gb_per_s
        # All ranks of a node send to other nodes at once.
        self.shared_gb_per_s = self.gb_per_s
        if crosses and network.uplink_gb_per_s:
            self.shared_gb_per_s = min(self.gb_per_s, network.uplink_gb_per_s / network.ranks_per_node)
        of_one_gpu = self.shared_gb_per_s / pieces.workload.tensor_parallel
        self.reduction_gb_per_s = min(pieces.reduction_gb_per_s, of_one_gpu)

    def ring_ms(self, tensors: int, attention_ms: float) -> float:
        """What is left of a ring's messages when each block's attention has hidden its share."""
        if self.size == 1:
            return 0.0
        step_bytes = self.channel_bytes * self.model.key_value_size * tensors
        step_ms = self.latency_ms + step_bytes / (self.gb_per_s * BYTES_PER_MS)
        return (self.size - 1) * max(0.0, step_ms - attention_ms / self.size)

    def all_gather_ms(self, tensors: int) -> float:
        """Keys and values of all ranks, and in the backward pass their gradients back."""
        if self.size == 1:
            return 0.0
        sent = self.channel_bytes * self.model.key_value_size * (self.size - 1) * tensors
        return tensors * self.latency_ms + sent / (self.shared_gb_per_s * BYTES_PER_MS)

    def all_to_all_ms(self) -> float:
        """Queries, keys and values there, the output back; attention waits for both."""
        if self.size == 1:
            return 0.0
        channels = self.model.query_size + self.model.attention_size + self.model.key_value_size
        sent = self.channel_bytes * channels * (self.size - 1) / self.size
        return 2 * self.latency_ms + sent / (self.shared_gb_per_s * BYTES_PER_MS)
