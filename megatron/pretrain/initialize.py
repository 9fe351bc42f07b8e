"""Process groups, devices and seeds."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from helixpipe.megatron_adapter import cpu_backend
from helixpipe.megatron_adapter.watching import join
from helixpipe.reliability.monitor import Monitor
from helixpipe.runtime.gpu import take_gpu
from helixpipe.runtime.job_store import Place, open_store
from megatron.pretrain.health.agreement import agree_on_arguments
from megatron.pretrain.health.rendezvous import fresh_store
from megatron.pretrain.settings.job import JobSettings


def initialize(settings: JobSettings, monitor: Monitor | None = None) -> None:
    """Join the process group, build Megatron's groups and seed the random states.

    Uses NCCL and one GPU per rank where GPUs are present, else gloo on the CPU with one thread per rank.
    Before the first message the ranks begin to watch each other, if there is a monitor, and compare what they
    were given.

    Raises:
        ValueError: ranks that were not given the same, or cannot find each other.
    """
    if cpu_backend.install():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        backend = "gloo"
    else:
        take_gpu()
        backend = "nccl"
    parallel = settings.parallel
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    store = fresh_store(parallel.rank, parallel.world_size, timeout)
    if store is None:
        store = open_store(
            Place.from_environment(parallel.world_size), parallel.rank, parallel.world_size, timeout
        )
    store.set_timeout(timeout)
    before = dist.PrefixStore("before", store)
    if monitor is not None:
        join(parallel.rank, monitor, before)
    agree_on_arguments(settings, before)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=parallel.rank,
        world_size=parallel.world_size,
        timeout=timeout,
    )
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        settings.schedule.virtual_stages,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    if monitor is not None:
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        monitor.place_in_pipeline(dist.get_process_group_ranks(pipeline))
    seed_random_states(settings.training.seed)


def seed_random_states(seed: int) -> None:
    """Seed dropout: different on pipeline and tensor-parallel ranks where Megatron wants it so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor_parallel.model_parallel_cuda_manual_seed(
            seed + 100 * parallel_state.get_pipeline_model_parallel_rank(), force_reset_rng=True
        )


def finalize() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
