"""Values of iterations for TensorBoard and Weights & Biases, under the names that Megatron-LM gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from megatron.pretrain.metrics import IterationMetrics
from megatron.pretrain.settings.job import JobSettings
from megatron.pretrain.settings.watching import Watching
from megatron.pretrain.side_outputs import SideOutput

_MEMORY = {
    "mem-reserved-bytes": "reserved_bytes.all.current",
    "mem-allocated-bytes": "allocated_bytes.all.current",
    "mem-max-allocated-bytes": "allocated_bytes.all.peak",
    "mem-allocated-count": "allocation.all.current",
}


class _Writer(Protocol):
    def write(self, values: Mapping[str, float], iteration: int, samples: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, watching: Watching, iteration: int) -> None:
        # Needed by those who ask for it only.
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier run has written of iterations that come again is hidden.
        self._writer = SummaryWriter(
            str(watching.tensorboard), max_queue=watching.queue_size, purge_step=iteration + 1
        )

    def write(self, values: Mapping[str, float], iteration: int, samples: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
            if not name.startswith(("mem-", "iteration-time", "throughput")):
                self._writer.add_scalar(f"{name} vs samples", value, samples)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, watching: Watching, settings: Mapping[str, Any]) -> None:
        import wandb

        folder = watching.wandb_folder
        self._run = wandb.init(
            project=watching.project,
            name=watching.run,
            entity=watching.entity,
            dir=None if folder is None else str(folder),
            config={name: value if isinstance(value, (int, float)) else str(value)
                    for name, value in settings.items()},
        )  # fmt: skip

    def write(self, values: Mapping[str, float], iteration: int, samples: int) -> None:
        self._run.log({**values, "samples vs steps": samples}, step=iteration)

    def close(self) -> None:
        self._run.finish()


class Scalars:
    """Writes on rank 0; what cannot be written does not end training.

    Args:
        settings: of the job.
        iteration: the last finished one.
    """

    def __init__(self, settings: JobSettings, iteration: int) -> None:
        self._settings = settings
        self._watching = settings.watching
        self._writers: list[_Writer] = []
        self._output = SideOutput(self._watching.tensorboard or self._watching.wandb_folder, "values")
        if settings.parallel.rank != 0:
            return
        if self._watching.tensorboard is not None:
            self._output.attempt(lambda: self._writers.append(_TensorBoard(self._watching, iteration)))
        if self._watching.project:
            self._output.attempt(
                lambda: self._writers.append(_WeightsAndBiases(self._watching, settings.options))
            )

    def iteration(self, metrics: IterationMetrics) -> None:
        """Write an iteration's values, if it is one of those that are written."""
        if self._writers and metrics.iteration % self._watching.interval == 0:
            self._write(values_of(metrics, self._settings), metrics.iteration, metrics.consumed_samples)

    def evaluation(self, loss: float, iteration: int, samples: int) -> None:
        """Write an evaluation's values."""
        values = {"lm loss validation": loss}
        if self._watching.has_perplexity:
            values["lm loss validation ppl"] = math.exp(min(20.0, loss))
        self._write(values, iteration, samples)

    def close(self) -> None:
        """Write what waits."""
        for writer in self._writers:
            self._output.attempt(writer.close)
        self._writers.clear()

    def summary(self) -> str:
        """What could not be written; empty if nothing is missing."""
        return self._output.summary()

    def _write(self, values: Mapping[str, float], iteration: int, samples: int) -> None:
        for writer in self._writers:
            self._output.attempt(lambda writer=writer: writer.write(values, iteration, samples))  # type: ignore[misc]


def values_of(metrics: IterationMetrics, settings: JobSettings) -> dict[str, float]:
    """What is written of an iteration."""
    watching = settings.watching
    found: dict[str, float | None] = {
        "learning-rate": metrics.learning_rate,
        "batch-size": settings.training.global_batch_size,
        "lm loss": metrics.lm_loss,
        "grad-norm": metrics.grad_norm,
        "num-zeros": metrics.num_zeros_in_grad,
        "params-norm": metrics.params_norm,
        "load_balancing_loss": metrics.load_balancing_loss,
        "z_loss": metrics.router_z_loss,
    }
    if watching.has_loss_scale:
        found["loss-scale"] = 1.0 if metrics.loss_scale is None else metrics.loss_scale
    if watching.has_world_size:
        found["world-size"] = settings.parallel.world_size
    if watching.has_timers:
        found["iteration-time"] = metrics.elapsed_ms / 1e3
        found["throughput"] = metrics.tflops_per_gpu
    if watching.has_memory and torch.cuda.is_available():
        statistics = torch.cuda.memory_stats()
        found |= {name: statistics[key] for name, key in _MEMORY.items()}
    elif watching.has_memory:
        found["mem-max-allocated-bytes"] = metrics.peak_memory_bytes[0]
    return {name: float(value) for name, value in found.items() if value is not None}
