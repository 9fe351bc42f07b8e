"""What an iteration tells: Megatron's line in the terminal, one JSON object in a file, the timeline."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from helixpipe.elastic.search.quick_plan import num_slices_of
from helixpipe.elastic.service.background import PlannedBatch
from helixpipe.megatron_adapter.schedule import device
from helixpipe.plan import Plan
from helixpipe.plan.simulation.timeline import Timeline
from helixpipe.reliability.loss_spikes import LossSpikes
from helixpipe.runtime.trace import Trace
from megatron.pretrain.settings.job import JobSettings
from megatron.pretrain.side_outputs import MetricsFile, SideOutput, replace_file, say, set_aside_later_files
from megatron.pretrain.throughput import ModelFlops, TimeToFinish


class Planning(NamedTuple):
    """How an iteration was planned; keys as in the metrics file, where only elastic schedules have them.

    With several replicas the seconds are those of the replica where they are most, the rest is of the one
    whose plan is predicted to take longest.

    Attributes:
        predicted_ms: from the first forward to the last backward.
        num_chunks, num_pipelines: of the plan.
        num_slices: K, of the most sliced sequence; 1 if none is cut.
        planning_s: that planning took, wherever it ran.
        planning_waited_s: that training waited for the plan.
        planning_fallback: whether a plan was late or not found, and a quick one has taken its place.
    """

    predicted_ms: float
    num_chunks: int
    num_pipelines: int
    num_slices: int
    planning_s: float
    planning_waited_s: float
    planning_fallback: bool

    @classmethod
    def of(cls, planned: PlannedBatch) -> Planning:
        """Of this rank's replica."""
        recipe = planned.plan.recipe
        return cls(
            predicted_ms=planned.plan.prediction.time_ms,
            num_chunks=len(recipe.chunks),
            num_pipelines=len(recipe.sizes),
            num_slices=num_slices_of(recipe),
            planning_s=planned.planning_s,
            planning_waited_s=planned.waited_s,
            planning_fallback=bool(planned.fallback),
        )

    @classmethod
    def over_ranks(cls, rows: Sequence[Sequence[float]]) -> Planning:
        """Combine one row of all these values per rank."""
        predicted_ms, chunks, pipelines, slices, *_ = max(map(tuple, rows))
        seconds, waited, fallback = (max(column) for column in list(zip(*rows, strict=True))[-3:])
        return cls(predicted_ms, int(chunks), int(pipelines), int(slices), seconds, waited, fallback > 0)


class StepResult(NamedTuple):
    """What the optimizer has done in an iteration; the same on every rank.

    Attributes:
        grad_norm: of the whole model; None if it was not computed.
        num_zeros_in_grad: elements that are zero, in the whole model; None if they were not counted.
        params_norm: of the weights after the step; None if it was not computed.
        loss_scale: that the losses were multiplied with; None where they are not.
        is_skipped: whether gradients overflowed, and the weights have stayed.
        load_balancing_loss, router_z_loss: what routers of experts add to the loss, without its weight; None
            where they add none.
    """

    grad_norm: float | None
    num_zeros_in_grad: int | None = None
    params_norm: float | None = None
    loss_scale: float | None = None
    is_skipped: bool = False
    load_balancing_loss: float | None = None
    router_z_loss: float | None = None


@dataclass(frozen=True)
class IterationMetrics:
    """The numbers of one iteration, the same on every rank; fields as in the metrics file.

    ``planning`` has keys of its own there. ``pipeline_ms`` is measured from the first operation to the last
    on the slowest rank, 0 where nothing is measured. ``tflops_per_gpu`` and ``mfu`` count half of attention's
    square, as a causal mask leaves it; None where they are not asked for.
    """

    iteration: int
    consumed_samples: int
    lm_loss: float
    grad_norm: float | None
    elapsed_ms: float
    tokens_per_second: float
    peak_memory_bytes: list[int]
    bubble_ratio: float
    schedule: str
    attention_backend: str
    learning_rate: float
    pipeline_ms: float
    num_zeros_in_grad: int | None = None
    params_norm: float | None = None
    loss_scale: float | None = None
    is_skipped: bool = False
    load_balancing_loss: float | None = None
    router_z_loss: float | None = None
    tflops_per_gpu: float | None = None
    mfu: float | None = None
    planning: Planning | None = None

    def to_json(self) -> str:
        """One line of the metrics file."""
        values = {name: value for name, value in vars(self).items() if name != "planning"}
        return json.dumps(values | (self.planning._asdict() if self.planning else {}))


def gather_metrics(
    settings: JobSettings,
    *,
    attention_backend: str,
    iteration: int,
    consumed_samples: int,
    losses: list[dict[str, torch.Tensor]],
    step: StepResult,
    elapsed_ms: float,
    learning_rate: float,
    flops: ModelFlops | None = None,
    trace: Trace,
    stop_flags: Sequence[int] = (),
    planning: Planning | None = None,
) -> tuple[IterationMetrics, list[list[int]]]:
    """Combine what each rank knows, in one collective; with the stop_flags of all ranks.

    Args:
        settings: of the job.
        attention_backend: that computes, by name.
        iteration: number of the iteration, from 1.
        consumed_samples: of the job, this iteration's included.
        losses: one dictionary per micro batch where the loss is computed, empty elsewhere.
        step: what the optimizer has done.
        elapsed_ms: this rank's time for the iteration, optimizer included.
        learning_rate: used in this iteration.
        flops: of an iteration; None if they are not counted.
        trace: what this rank ran.
        stop_flags: whatever else this rank has to tell the others; of the same length everywhere.
        planning: of this rank's replica, or None on all ranks.
    """
    mine = (*sum_losses(losses), elapsed_ms, trace.total_ms(), trace.busy_ms(), _peak_memory_bytes())
    loss_sums, token_counts, elapsed, total, busy, memory, *rest = _of_all_ranks(
        [*mine, *(planning or ()), *stop_flags]
    )
    plans, told = rest[: len(planning or ())], rest[len(planning or ()) :]
    elapsed_ms = max(elapsed)
    # Documents differ in tokens: of an elastic batch those with loss are counted.
    training = settings.training
    joined = settings.schedule.execution.joins_documents
    num_tokens = training.global_batch_size * training.seq_length if joined else sum(token_counts)
    span = max(total)
    metrics = IterationMetrics(
        iteration=iteration,
        consumed_samples=consumed_samples,
        lm_loss=_mean_loss(loss_sums, token_counts),
        **step._asdict(),
        elapsed_ms=elapsed_ms,
        tokens_per_second=num_tokens / elapsed_ms * 1e3,
        peak_memory_bytes=[int(value) for value in memory],
        bubble_ratio=1.0 - sum(busy) / (len(busy) * span) if span else 0.0,
        schedule=settings.schedule.name,
        attention_backend=attention_backend,
        learning_rate=learning_rate,
        pipeline_ms=span,
        tflops_per_gpu=None if flops is None else flops.tflops(elapsed_ms, settings.parallel.world_size)[0],
        mfu=None if flops is None else flops.mfu(elapsed_ms, settings.parallel.world_size),
        planning=Planning.over_ranks(list(zip(*plans, strict=True))) if plans else None,
    )
    return metrics, [[int(value) for value in column] for column in told]


def _of_all_ranks(mine: Sequence[float]) -> list[list[float]]:
    """For each of this rank's numbers, those of all ranks; collective."""
    table = torch.zeros(dist.get_world_size(), len(mine), dtype=torch.float64, device=device())
    table[dist.get_rank()] = torch.tensor([float(number) for number in mine], dtype=torch.float64)
    dist.all_reduce(table)
    return table.T.tolist()


def sum_losses(losses: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
    """Sum of token losses and number of tokens over micro batches, on one rank of each tensor group."""
    if not losses or parallel_state.get_tensor_model_parallel_rank() != 0:
        return 0.0, 0.0
    loss_sum, tokens = torch.stack([entry["lm loss"].double() for entry in losses]).sum(dim=0).tolist()
    return loss_sum, tokens


def _mean_loss(loss_sums: list[float], token_counts: list[float]) -> float:
    tokens = sum(token_counts)
    return sum(loss_sums) / tokens if tokens else math.nan


def mean_loss(losses: list[dict[str, torch.Tensor]]) -> float:
    """Mean token loss over all ranks, on every rank."""
    total = torch.tensor(sum_losses(losses), dtype=torch.float64, device=device())
    dist.all_reduce(total)
    loss_sum, tokens = total.tolist()
    return _mean_loss([loss_sum], [tokens])


def _peak_memory_bytes() -> int:
    """Allocated by torch on a GPU; resident memory of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Reporter:
    """Prints on rank 0, and writes metrics and timelines there; what cannot be written does not end training.

    Args:
        settings: of the job: where to write, how often to print.
        iteration: the last finished iteration; lines and timelines of later ones are set aside.
    """

    def __init__(self, settings: JobSettings, iteration: int) -> None:
        self._settings = settings
        self._output = settings.output
        self._is_writer = settings.parallel.rank == 0
        self._spikes = LossSpikes()
        self._plans: list[Planning] = []
        self._file: MetricsFile | None = None
        self.flops = ModelFlops.of(settings) if settings.watching.has_throughput else None
        self._time = TimeToFinish(settings.training.train_iters)
        self._metrics = SideOutput(self._output.metrics_jsonl, "metrics of iterations")
        self._traces = SideOutput(self._output.trace_dir, "timelines and plans")
        if self._is_writer and self._output.metrics_jsonl is not None:
            self._metrics.attempt(lambda: self._open(iteration))
        if self._is_writer and self._output.trace_dir is not None:
            folder = self._output.trace_dir
            self._traces.attempt(lambda: set_aside_later_files(folder, iteration))
            self._traces.attempt(lambda: self._write("arguments.json", _as_json(settings.options)))
        plan = settings.schedule.plan
        if self._is_writer and self._output.trace_dir is not None and plan is not None:
            self._traces.attempt(lambda: self._write("plan.json", plan.to_json()))

    def report(self, metrics: IterationMetrics) -> None:
        """Print the iteration's line and append to the metrics file."""
        if not self._is_writer:
            return
        if metrics.planning is not None:
            self._plans.append(metrics.planning)
        if metrics.iteration % self._output.log_interval == 0:
            say(iteration_line(metrics, self._settings) + self._of_the_job(metrics))
        spike = self._spikes.check(metrics.lm_loss)
        if spike:
            say(f"iteration {metrics.iteration}: {spike}")
        if self._output.metrics_jsonl is not None:
            self._metrics.attempt(lambda: self._append(metrics))

    def _of_the_job(self, metrics: IterationMetrics) -> str:
        """What follows from the whole job, behind an iteration's line."""
        size = self._settings.parallel.world_size
        found = "" if self.flops is None else f" | {self.flops.text(metrics.elapsed_ms, size)}"
        left = self._time.after(metrics.iteration, metrics.elapsed_ms)
        return found + (f" | time to finish: {left}" if left else "")

    def write_timeline(self, iteration: int, plan: Plan | None, trace: Trace) -> None:
        """Write the measured timeline of the first pipeline, and a batch's own plan; collective."""
        assert plan is not None, "an iteration has run"
        if self._output.trace_dir is None:
            return
        group = parallel_state.get_pipeline_model_parallel_group()
        ranks: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(ranks, (trace.spans(), trace.waits()), group=group)
        if self._is_writer:
            spans, waits = zip(*ranks, strict=True)
            timeline = Timeline(
                spans,
                f"{plan.schedule}, measured in iteration {iteration}",
                plan.segment_names,
                waits=waits if trace.sees_waits else (),
            )
            name = f"{iteration:07d}.json"
            self._traces.attempt(lambda: self._write(f"iteration_{name}", timeline.to_json()))
            if self._settings.schedule.plan is None:
                self._traces.attempt(lambda: self._write(f"plan_{name}", plan.to_json()))

    def _open(self, iteration: int) -> None:
        assert self._output.metrics_jsonl is not None
        self._file = MetricsFile(self._output.metrics_jsonl, iteration)

    def _append(self, metrics: IterationMetrics) -> None:
        if self._file is None:
            self._open(metrics.iteration - 1)
        assert self._file is not None
        self._file.append(metrics.to_json())

    def _write(self, name: str, text: str) -> None:
        folder = self._output.trace_dir
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / name, text)

    def summary(self) -> str:
        """What could not be written; empty if nothing is missing."""
        return "; ".join(filter(None, (self._metrics.summary(), self._traces.summary())))

    def planning_summary(self) -> str:
        """How long planning took, and how long training waited for it; empty if nothing was planned."""
        if not self._plans:
            return ""
        first, *later = self._plans
        took, waited = sum(plan.planning_s for plan in later), sum(plan.planning_waited_s for plan in later)
        fallbacks = sum(plan.planning_fallback for plan in self._plans)
        return (
            f"planning took {first.planning_s:.2f} s for the first batch, waited for "
            f"{first.planning_waited_s:.2f} s, and {took:.2f} s for the other {len(later)}, waited for "
            f"{waited:.2f} s; quick plans instead of late ones: {fallbacks}"
        )

    def say(self, text: str) -> None:
        """Print a line, once for the whole job; none if there is nothing to say."""
        if self._is_writer and text:
            say(text)


def _as_json(options: Mapping[str, Any]) -> str:
    """Options by name; what JSON has no form for as text."""
    return json.dumps(dict(options), indent=1, sort_keys=True, default=str) + "\n"


def iteration_line(metrics: IterationMetrics, settings: JobSettings) -> str:
    """Megatron's line, with throughput and the measured bubble."""
    norm = "n/a" if metrics.grad_norm is None else f"{metrics.grad_norm:.3f}"
    training, measures = settings.training, settings.output.measures
    width = len(str(training.train_iters))
    parts = [
        f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration "
        f"{metrics.iteration:{width}d}/{training.train_iters}",
        f"consumed samples: {metrics.consumed_samples}",
        f"elapsed time per iteration (ms): {metrics.elapsed_ms:.1f}",
        f"tokens per second: {metrics.tokens_per_second:.0f}",
        f"learning rate: {metrics.learning_rate:.6E}",
        f"global batch size: {training.global_batch_size}",
        f"lm loss: {metrics.lm_loss:.6E}",
        f"grad norm: {norm}",
    ]
    if metrics.load_balancing_loss is not None:
        parts.append(f"load balancing loss: {metrics.load_balancing_loss:.6E}")
    if metrics.router_z_loss is not None:
        parts.append(f"router z loss: {metrics.router_z_loss:.6E}")
    if metrics.num_zeros_in_grad is not None:
        parts.append(f"num zeros: {metrics.num_zeros_in_grad}")
    if metrics.params_norm is not None:
        parts.append(f"params norm: {metrics.params_norm:.3f}")
    if metrics.loss_scale is not None:
        parts.append(f"loss scale: {metrics.loss_scale:.1f}")
        parts.append(f"skipped: {'yes' if metrics.is_skipped else 'no'}")
    parts.append(f"peak memory (GiB): {max(metrics.peak_memory_bytes) / 2**30:.2f}")
    if measures:
        parts.append(f"bubble: {100 * metrics.bubble_ratio:.1f}%")
    if metrics.planning is not None:
        plan, measured = metrics.planning, f"{metrics.pipeline_ms:.1f}" if measures else "n/a"
        parts.append(
            f"pipelines: {plan.num_pipelines} | chunks: {plan.num_chunks} | slices: {plan.num_slices}"
        )
        parts.append(f"predicted (ms): {plan.predicted_ms:.1f} | measured (ms): {measured}")
        parts.append(f"planning (s): {plan.planning_s:.2f} | waited (s): {plan.planning_waited_s:.2f}")
    return " | ".join(parts)
