"""Times of a layer's pieces from rates: matrix products, attention, memory and links each at their own."""

from __future__ import annotations

from helixpipe.plan.cost_model.hardware import Hardware
from helixpipe.plan.cost_model.pieces import PieceCost, Pieces
from helixpipe.plan.cost_model.work import Workload
from helixpipe.plan.simulation.network import BYTES_PER_MS, Network

# Flash attention's backward recomputes the scores: five products where the forward has two.
_BACKWARD_PRODUCTS = 2.5
# Bytes per logit that the vocabulary-parallel loss moves: conversion to fp32, maximum, exponential, sum and
# quotient forward; difference, scaling and conversion backward (each pass reads and most write).
_LOSS_BYTES_FORWARD = 30
_LOSS_BYTES_BACKWARD = 22
# Bytes the optimizer moves per weight: gradient read, three fp32 states read and written, weight written, and
# the gradient once more for its norm.
_OPTIMIZER_BYTES = 34
# What Megatron's fp8 covers: the head stays bf16.
_FP8_PIECES = ("qkv", "proj", "fc1", "fc2")
# An output tile of a large product, as CUTLASS and cuBLAS cut it.
_TILE = 128 * 256
# What the host spends to launch the kernels of one operation that the device does not hide.
_OVERHEAD_MS = 0.05


def predict_pieces(workload: Workload, hardware: Hardware) -> Pieces:
    """Pieces of ``workload`` on ``hardware``.

    Sequence-parallel gathers and scatters are exposed in the forward pass and where a backward starts with
    one; those that Megatron issues beside a matrix product of the backward are hidden as far as it lasts.
    """
    assert workload.context_parallel == 1, "share_sequence divides what whole sequences cost"
    if workload.fp8_products and not hardware.fp8_tflops:
        raise ValueError(f"{hardware.name} has no fp8 matrix products; leave --fp8 out")
    rates = _Rates(workload, hardware)
    unit = workload.unit_bytes
    gather = rates.collective_ms
    model = workload.model
    rope = workload.channel_bytes(model.query_size + model.key_size)
    fc1 = workload.channel_bytes(model.fc1_size)
    activation = workload.channel_bytes(model.mlp_width)
    # Each copy of a token is written where its expert reads it, and experts' outputs are summed up.
    copied = rates.moved((1 + workload.routed_copies) * unit) if model.experts else 0.0
    core_ms = rates.core_ms()
    times = {
        "embedding": PieceCost(rates.moved(2 * unit) + gather, rates.moved(3 * unit) + gather),
        # The backward of a norm also adds its gradient to the residual's.
        "norm1": PieceCost(rates.moved(2 * unit), rates.moved(6 * unit)),
        "qkv": rates.column("qkv", rates.moved(2 * rope), rates.moved(2 * rope)),
        "core": PieceCost(core_ms[0], core_ms[1]),
        "proj": rates.row("proj", rates.moved(3 * unit)),
        "norm2": PieceCost(rates.moved(2 * unit), rates.moved(6 * unit)),
        "fc1": rates.column(
            "fc1", rates.moved(fc1 + activation) + copied, rates.moved(2 * fc1 + activation) + copied
        ),
        "fc2": rates.row("fc2", rates.moved(3 * unit) + copied, copied),
        "head": rates.column(
            "head",
            rates.moved(2 * unit + workload.num_logits * _LOSS_BYTES_FORWARD),
            rates.moved(3 * unit + workload.num_logits * _LOSS_BYTES_BACKWARD),
        ),
    }
    return Pieces(
        source=f"{model.name} on {hardware.name}, predicted",
        workload=workload,
        times=times,
        network=pipeline_network(workload, hardware),
        reduction_gb_per_s=group_gb_per_s(hardware, workload.stage_gpus),
        optimizer_ns=_OPTIMIZER_BYTES / (hardware.memory_gb_per_s * hardware.memory_efficiency),
        overhead_ms=_OVERHEAD_MS,
        multiprocessors=hardware.multiprocessors,
    )


def pipeline_network(workload: Workload, hardware: Hardware) -> Network:
    """Links between the ranks of one pipeline.

    Megatron numbers tensor-parallel GPUs first, then those that share a sequence, then replicas, then stages:
    a node holds as many stages of one pipeline as fit beside the replicas. The GPUs of a rank each send their
    part of a message.
    """
    t = workload.tensor_parallel
    ranks_per_node = max(1, hardware.gpus_per_node // workload.stage_gpus)
    nics = hardware.nics_per_node * min(1.0, t / hardware.gpus_per_node)
    nic_gb_per_s = hardware.nic_gb_per_s * hardware.link_efficiency
    return Network(
        latency_ms=hardware.latency_ms,
        gb_per_s=t * hardware.nvlink_gb_per_s * hardware.link_efficiency,
        ranks_per_node=ranks_per_node,
        node_latency_ms=hardware.node_latency_ms,
        node_gb_per_s=max(nics, 1.0) * nic_gb_per_s,
        # Replicas on the node have their share of its cards.
        uplink_gb_per_s=max(ranks_per_node * nics, 1.0) * nic_gb_per_s,
    )


def group_gb_per_s(hardware: Hardware, num_gpus: int) -> float:
    """What one GPU sends to a group of neighbours: NVLink within a node, else its network card."""
    if num_gpus <= hardware.gpus_per_node:
        return hardware.nvlink_gb_per_s * hardware.link_efficiency
    share = hardware.nics_per_node / hardware.gpus_per_node
    return hardware.nic_gb_per_s * share * hardware.link_efficiency


class _Rates:
    def __init__(self, workload: Workload, hardware: Hardware) -> None:
        self.workload = workload
        self.hardware = hardware
        t = workload.tensor_parallel
        whole = workload.tokens * workload.model.hidden_size * workload.element_bytes
        rate = group_gb_per_s(hardware, t) * BYTES_PER_MS
        # A gather or a scatter of one residual; without sequence parallelism an all-reduce is both.
        self.collective_ms = (t - 1) / t * whole / rate if t > 1 else 0.0

    def moved(self, num_bytes: float) -> float:
        """Milliseconds of a streaming kernel."""
        return num_bytes / (self.hardware.memory_gb_per_s * self.hardware.memory_efficiency * BYTES_PER_MS)

    def is_fp8(self, piece: str) -> bool:
        """True for what is computed in fp8."""
        return self.workload.fp8_products and piece in _FP8_PIECES

    def product(self, piece: str) -> float:
        """Milliseconds of one matrix product with a piece's weights.

        Tiles of the output are computed in waves of one for each SM; of the last wave half is taken to be
        idle (NVIDIA, Matrix Multiplication Background User's Guide, wave quantization).
        """
        hardware = self.hardware
        tflops, share = hardware.tflops, hardware.matmul_efficiency
        if self.is_fp8(piece):
            tflops, share = hardware.fp8_tflops, hardware.fp8_matmul_efficiency
        per_ms = tflops * share * 1e9
        flops = 2.0 * self.workload.tokens * self.workload.parameters[piece]
        wave = hardware.multiprocessors * 2.0 * _TILE * self._input_channels(piece)
        return (flops + hardware.idle_last_wave * wave) / per_ms

    def casts(self, piece: str) -> tuple[float, float]:
        """Milliseconds of casting a product's input, and its output's gradient, to fp8 in two layouts."""
        if not self.is_fp8(piece):
            return 0.0, 0.0
        workload, model = self.workload, self.workload.model
        unit = workload.unit_bytes
        inputs, outputs = {
            "qkv": (unit, workload.channel_bytes(model.query_size + model.key_value_size)),
            "proj": (workload.channel_bytes(model.attention_size), unit),
            "fc1": (unit * max(1, workload.routed_copies), workload.channel_bytes(model.fc1_size)),
            "fc2": (workload.channel_bytes(model.mlp_width), unit),
        }[piece]
        return self.moved(2 * inputs), self.moved(2 * outputs)

    def _input_channels(self, piece: str) -> int:
        model, t = self.workload.model, self.workload.tensor_parallel
        # An expert is whole on its GPU.
        width = model.experts.ffn_hidden_size if model.experts else model.ffn_hidden_size // t
        return {"proj": model.attention_size // t, "fc2": width}.get(piece, model.hidden_size)

    def exchange_ms(self, piece: str) -> float:
        """A gather or a scatter along the sequence; to experts and back, an all-to-all.

        Tokens are taken to be shared evenly by experts. Shared experts are cut by tensor parallelism.
        """
        workload, experts = self.workload, self.workload.model.experts
        if experts is None or piece not in ("fc1", "fc2"):
            return self.collective_ms
        size = workload.expert_parallel
        sent = workload.routed_copies * workload.unit_bytes * (size - 1) / size
        all_to_all_ms = sent / (group_gb_per_s(self.hardware, size) * BYTES_PER_MS)
        return all_to_all_ms + (self.collective_ms if experts.shared_ffn_hidden_size else 0.0)

    def core_ms(self) -> tuple[float, float]:
        """Attention, forward and backward."""
        workload, hardware = self.workload, self.hardware
        flops = workload.micro_batch_size * workload.model.core_flops(workload.seq_length)
        ideal_ms = flops / workload.tensor_parallel / (hardware.tflops * 1e9)
        ideal_ms *= 1 + hardware.attention_half_length / workload.seq_length
        return (
            ideal_ms / hardware.attention_forward_efficiency,
            _BACKWARD_PRODUCTS * ideal_ms / hardware.attention_backward_efficiency,
        )

    def column(self, piece: str, forward_ms: float, backward_ms: float) -> PieceCost:
        """A column-parallel product: gathers its input, scatters its input gradient."""
        product = self.product(piece)
        cast_input, cast_gradient = self.casts(piece)
        exchange_ms = self.exchange_ms(piece)
        forward = forward_ms + cast_input + product + exchange_ms
        if self.workload.model.experts and piece == "fc1":
            # What was sent to experts is kept, and nothing is beside the gradient's way back.
            return PieceCost(forward, backward_ms + cast_gradient + product + exchange_ms, product)
        exposed = max(0.0, exchange_ms - product)
        # Backward: the input is gathered again beside one product, the gradient scattered beside the other.
        return PieceCost(forward, backward_ms + cast_gradient + product + exposed, product + exposed)

    def row(self, piece: str, forward_ms: float, backward_ms: float = 0.0) -> PieceCost:
        """A row-parallel product with the residual's sum: scatters its output, gathers its gradient."""
        product = self.product(piece)
        cast_input, cast_gradient = self.casts(piece)
        return PieceCost(
            forward_ms + cast_input + product + self.exchange_ms(piece),
            backward_ms + cast_gradient + product + self.exchange_ms(piece),
            product,
        )
