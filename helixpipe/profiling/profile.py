"""Measure everything that the planner's cost model otherwise predicts."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.module import Float16Module

from helixpipe.elastic.costs.fit import Measurement
from helixpipe.layers.fusions import can_fuse_rope
from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.layers.spec import default_implementation
from helixpipe.megatron_adapter import cpu_backend
from helixpipe.megatron_adapter.schedule import device
from helixpipe.plan.cost_model import PieceCost, Pieces, Workload
from helixpipe.plan.simulation.network import Network
from helixpipe.profiling.chunks import ElasticLayer, chunk_shapes, measure_chunks
from helixpipe.profiling.layer import measure_pieces
from helixpipe.profiling.links import measure_network
from helixpipe.profiling.stopwatch import Stopwatch
from helixpipe.runtime.communicator import TorchCommunicator
from helixpipe.runtime.gpu import barrier, take_gpu
from helixpipe.runtime.trace import default_clock


def profile(workload: Workload, *, repeats: int = 5, alive: int = 4) -> Pieces:
    """Measure ``workload`` on this machine; every rank of the job takes part and gets the same result.

    Under torchrun, each tensor-parallel group stands for a pipeline rank: they all measure at the same time,
    as they compute at the same time in training, and the first two measure their link.

    Args:
        workload: model and sizes. One layer of it is built.
        repeats: rounds per piece.
        alive: micro batches alive at once.

    Raises:
        ValueError: a world size that is no multiple of the tensor-parallel size.
    """
    with _job(workload):
        return _measure(workload, repeats, alive)


def profile_chunks(
    workload: Workload, max_seq_length: int, *, repeats: int = 5
) -> tuple[Pieces, tuple[Measurement, ...]]:
    """What :func:`profile` measures and one layer over chunks; every rank takes part and gets the same.

    Args:
        workload: model and sizes; its sequence length is that of the pieces.
        max_seq_length: of the longest chunk and its context together.
        repeats: rounds.

    Raises:
        ValueError: sequences that are too short, or a world size as for :func:`profile`.
    """
    shapes = chunk_shapes(max_seq_length, workload.tensor_parallel)
    with _job(workload):
        pieces = _measure(workload, repeats, alive=2)
        stopwatch = Stopwatch(default_clock(), repeats, 2, barrier)
        here = device()
        found = measure_chunks(_elastic_layer(workload), shapes, stopwatch, here)
        times = _mean(tuple(time for m in found for time in (m.forward_ms, m.backward_ms)), here)
    means = zip(found, times[::2], times[1::2], strict=True)
    return pieces, tuple(replace(m, forward_ms=forward, backward_ms=back) for m, forward, back in means)


@contextmanager
def _job(workload: Workload) -> Iterator[None]:
    """The process group and Megatron's groups, made here unless they exist."""
    started_here = not dist.is_initialized()
    if started_here:
        _join(workload)
    try:
        yield
    finally:
        if started_here:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _measure(workload: Workload, repeats: int, alive: int) -> Pieces:
    here = device()
    stopwatch = Stopwatch(default_clock(), repeats, alive, barrier)
    model, wrapped = _model(workload)
    times = measure_pieces(model, workload, stopwatch, here)
    communicator = TorchCommunicator(parallel_state.get_pipeline_model_parallel_group())
    network = measure_network(communicator, workload.unit_bytes, here, workload.tensor_parallel)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer_ms = stopwatch.plain(_optimizer_step(workload, wrapped))
    times = {name: PieceCost(*_mean((t.forward, t.backward, t.weight), here)) for name, t in times.items()}
    links = (network.latency_ms, network.gb_per_s, network.send_gb_per_s, network.receive_gb_per_s)
    latency, rate, send, receive, optimizer_ms = _mean((*links, optimizer_ms), here)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    unmeasured = "" if communicator.size > 1 else ", links not measured"
    return Pieces(
        source=f"{workload.model.name} measured on {dist.get_world_size()} x {where}{unmeasured}",
        workload=workload,
        times=times,
        network=Network(latency_ms=latency, gb_per_s=rate, send_gb_per_s=send, receive_gb_per_s=receive),
        reduction_gb_per_s=rate / workload.tensor_parallel,
        optimizer_ns=optimizer_ms / parameters * 1e6,
    )


def _join(workload: Workload) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    on_cpu = cpu_backend.install()
    if on_cpu:
        torch.set_num_threads(1)
    else:
        take_gpu()
    os.environ.setdefault("MASTER_ADDR", "localhost")
    # Alone, any free port will do; torchrun sets its own.
    os.environ.setdefault("MASTER_PORT", "0")
    dist.init_process_group("gloo" if on_cpu else "nccl", rank=rank, world_size=world)
    prepare(workload, world)


def prepare(workload: Workload, world_size: int) -> None:
    """Build Megatron's groups for a profile in a process group of ``world_size`` ranks.

    Raises:
        ValueError: a world size that is no multiple of the tensor-parallel size.
    """
    t = workload.tensor_parallel
    if workload.model.beside_dense:
        raise ValueError(
            f"{workload.model.name} has {', '.join(workload.model.beside_dense)}, which no layer here "
            "computes to be measured; plan with rates of a machine instead"
        )
    if world_size % t:
        raise ValueError(
            f"{world_size} ranks cannot be split into tensor-parallel groups of {t}; start {t} or {2 * t} "
            f"(torchrun --nproc-per-node {2 * t} -m helixpipe profile)"
        )
    cpu_backend.install()
    parallel_state.initialize_model_parallel(t, world_size // t)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def _model(workload: Workload) -> tuple[SegmentedGPTModel, DistributedDataParallel]:
    """One layer with both ends, wrapped as for training: gradients go where the optimizer finds them."""
    shape = workload.model
    config = _config(workload)
    multiple = 128 * workload.tensor_parallel
    model = SegmentedGPTModel(
        config,
        default_implementation(),
        range(0, 3, 2),
        -(-shape.vocab_size // multiple) * multiple,
        workload.seq_length,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope" if shape.gated else "learned_absolute",
    ).cuda()
    return model, _wrapped(config, model)


def _elastic_layer(workload: Workload) -> ElasticLayer:
    """One layer as elastic pipelines execute it, its gradients where training has them."""
    config = _config(workload)
    layer: ElasticLayer = ElasticLayer(config, default_implementation(), rotates=workload.model.gated).cuda()
    _wrapped(config, layer)
    return layer


def _config(workload: Workload) -> TransformerConfig:
    """Of the model with a single layer."""
    shape = workload.model
    fuse = torch.cuda.is_available()
    bf16 = workload.element_bytes == 2
    return TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm" if shape.gated else "LayerNorm",
        gated_linear_unit=shape.gated,
        activation_func=torch.nn.functional.silu if shape.gated else torch.nn.functional.gelu,
        add_bias_linear=not shape.gated,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=workload.tensor_parallel,
        sequence_parallel=workload.sharded > 1,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_cpu_initialization=True,
        bias_dropout_fusion=fuse,
        bias_activation_fusion=fuse,
        apply_rope_fusion=shape.gated and can_fuse_rope(torch.bfloat16 if bf16 else torch.float32),
    )


def _wrapped(config: TransformerConfig, model: MegatronModule) -> DistributedDataParallel:
    module = Float16Module(config, model) if config.bf16 else model
    return DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=config.bf16), module
    )


def _optimizer_step(workload: Workload, wrapped: DistributedDataParallel) -> Callable[[], None]:
    """What a training loop does once per iteration: clear gradients, clip them, update."""
    bf16 = workload.element_bytes == 2
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-4,
        clip_grad=1.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    optimizer = get_megatron_optimizer(config, [wrapped])

    def step() -> None:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        optimizer.step()

    return step


def _mean(values: tuple[float, ...], device: torch.device) -> tuple[float, ...]:
    """The mean over all ranks, so that every rank plans with the same numbers."""
    table = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(table)
    return tuple((table / dist.get_world_size()).tolist())
