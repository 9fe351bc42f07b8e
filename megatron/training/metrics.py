"""What an iteration tells: Megatron's line in the terminal, one JSON object in a file, the timeline."""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from helixpipe.megatron_adapter.schedule import ELASTIC, device
from helixpipe.plan import Plan
from helixpipe.plan.timeline import Timeline
from helixpipe.reliability.loss_spikes import LossSpikes
from helixpipe.runtime.trace import Trace


@dataclass(frozen=True)
class IterationMetrics:
    """The numbers of one iteration, the same on every rank; fields as in the metrics file."""

    iteration: int
    lm_loss: float
    grad_norm: float | None
    elapsed_ms: float
    tokens_per_second: float
    peak_memory_bytes: list[int]
    bubble_ratio: float
    schedule: str
    learning_rate: float


def gather_metrics(
    args: argparse.Namespace,
    *,
    iteration: int,
    losses: list[dict[str, torch.Tensor]],
    grad_norm: float | None,
    elapsed_ms: float,
    learning_rate: float,
    trace: Trace,
    news: Sequence[int] = (),
) -> tuple[IterationMetrics, list[list[int]]]:
    """Combine what each rank knows, in one collective; with the news of all ranks.

    Args:
        args: parsed arguments.
        iteration: number of the iteration, from 1.
        losses: one dictionary per micro batch where the loss is computed, empty elsewhere.
        grad_norm: of the whole model, or None if it was not computed.
        elapsed_ms: this rank's time for the iteration, optimizer included.
        learning_rate: used in this iteration.
        trace: what this rank ran.
        news: whatever else this rank has to tell the others; of the same length everywhere.
    """
    loss_sum, tokens = sum_losses(losses)
    mine = [loss_sum, tokens, elapsed_ms, trace.total_ms(), trace.busy_ms(), float(_peak_memory_bytes())]
    mine += map(float, news)
    table = torch.zeros(dist.get_world_size(), len(mine), dtype=torch.float64, device=device())
    table[dist.get_rank()] = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(table)
    loss_sums, token_counts, elapsed, total, busy, memory, *told = table.T.tolist()
    elapsed_ms = max(elapsed)
    # Documents differ in tokens: of an elastic batch those with loss are counted.
    is_elastic = args.pipeline_schedule == ELASTIC
    num_tokens = sum(token_counts) if is_elastic else args.global_batch_size * args.seq_length
    span = max(total)
    metrics = IterationMetrics(
        iteration=iteration,
        lm_loss=_mean_loss(loss_sums, token_counts),
        grad_norm=grad_norm,
        elapsed_ms=elapsed_ms,
        tokens_per_second=num_tokens / elapsed_ms * 1e3,
        peak_memory_bytes=[int(value) for value in memory],
        bubble_ratio=1.0 - sum(busy) / (len(busy) * span) if span else 0.0,
        schedule=args.pipeline_schedule,
        learning_rate=learning_rate,
    )
    return metrics, [[int(value) for value in column] for column in told]


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
    """Writes metrics and timelines on rank 0.

    Args:
        args: parsed arguments: where to write, how often to print.
        iteration: the last finished iteration; lines of later ones in an existing file are dropped.
    """

    def __init__(self, args: argparse.Namespace, iteration: int) -> None:
        self.args = args
        self._is_writer = args.rank == 0
        self._file = None
        self._spikes = LossSpikes()
        if self._is_writer and args.metrics_jsonl is not None:
            args.metrics_jsonl.parent.mkdir(parents=True, exist_ok=True)
            _drop_later_lines(args.metrics_jsonl, iteration)
            self._file = args.metrics_jsonl.open("a", encoding="utf-8")
        if self._is_writer and args.trace_dir is not None:
            args.trace_dir.mkdir(parents=True, exist_ok=True)

    def report(self, metrics: IterationMetrics) -> None:
        """Print the iteration's line and append to the metrics file."""
        if not self._is_writer:
            return
        if metrics.iteration % self.args.log_interval == 0:
            print(iteration_line(metrics, self.args), flush=True)
        spike = self._spikes.check(metrics.lm_loss)
        if spike:
            print(f"iteration {metrics.iteration}: {spike}", flush=True)
        if self._file is not None:
            self._file.write(json.dumps(asdict(metrics)) + "\n")
            self._file.flush()

    def write_timeline(self, iteration: int, plan: Plan, trace: Trace) -> None:
        """Write the measured timeline of the first pipeline; collective."""
        if self.args.trace_dir is None:
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
            path = self.args.trace_dir / f"iteration_{iteration:07d}.json"
            path.write_text(timeline.to_json(), encoding="utf-8")
            (self.args.trace_dir / "plan.json").write_text(plan.to_json(), encoding="utf-8")

    def say(self, text: str) -> None:
        """Print a line, once for the whole job."""
        if self._is_writer:
            print(text, flush=True)


def iteration_line(metrics: IterationMetrics, args: argparse.Namespace) -> str:
    """Megatron's line, with throughput and the measured bubble."""
    norm = "n/a" if metrics.grad_norm is None else f"{metrics.grad_norm:.3f}"
    width = len(str(args.train_iters))
    parts = [
        f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {metrics.iteration:{width}d}/{args.train_iters}",
        f"consumed samples: {metrics.iteration * args.global_batch_size}",
        f"elapsed time per iteration (ms): {metrics.elapsed_ms:.1f}",
        f"tokens per second: {metrics.tokens_per_second:.0f}",
        f"learning rate: {metrics.learning_rate:.6E}",
        f"global batch size: {args.global_batch_size}",
        f"lm loss: {metrics.lm_loss:.6E}",
        f"grad norm: {norm}",
    ]
    parts.append(f"peak memory (GiB): {max(metrics.peak_memory_bytes) / 2**30:.2f}")
    if args.measure:
        parts.append(f"bubble: {100 * metrics.bubble_ratio:.1f}%")
    return " | ".join(parts)


def _drop_later_lines(path: Path, iteration: int) -> None:
    """A resumed run replaces the lines of the iterations that it repeats; a fresh run replaces all."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a killed run may be cut
    path.write_text("".join(kept), encoding="utf-8")
