"""The training loop."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch

from helixpipe.megatron_adapter.schedule import ELASTIC, chunk_iterators, make_schedule
from helixpipe.runtime.trace import NullClock, default_clock
from megatron.training.checkpointing import Progress, load_checkpoint, save_checkpoint
from megatron.training.data.gpt import Batch, build_iterators
from megatron.training.elastic import ElasticTraining
from megatron.training.initialize import initialize, seed_random_states
from megatron.training.metrics import IterationMetrics, Reporter, gather_metrics, mean_loss
from megatron.training.model import TrainingState, build_training_state

ForwardStep = Callable[..., Any]


def pretrain(args: argparse.Namespace, forward_step: ForwardStep) -> None:
    """Train from the given arguments to ``--train-iters``.

    Args:
        args: from :func:`megatron.training.arguments.parse_arguments`.
        forward_step: Megatron's ``forward_step_func(data_iterator, model)``.

    Raises:
        ValueError: bad input found after the arguments were parsed, or a loss that is not finite.
    """
    initialize(args)
    args.measure = args.metrics_jsonl is not None or args.trace_dir is not None
    schedule = make_schedule(
        args.pipeline_schedule, args.schedule_request, default_clock() if args.measure else NullClock()
    )
    state = build_training_state(args)
    progress = load_checkpoint(args, state) if args.load is not None else Progress()
    reporter = Reporter(args, progress.iteration)
    _announce(args, progress, reporter)
    run = _Run(args, forward_step, schedule, state, reporter)
    if args.pipeline_schedule == ELASTIC:
        with closing(ElasticTraining(args, progress.consumed_samples)) as batches:
            _train(args, run, progress, batches, None)
    else:
        _train(args, run, progress, *build_iterators(args, progress.consumed_samples))


def _train(
    args: argparse.Namespace,
    run: _Run,
    progress: Progress,
    train_data: Iterator[Any] | None,
    valid_data: Iterator[Batch] | None,
) -> None:
    """Iterate to ``--train-iters``, with evaluations and checkpoints in between."""
    while progress.iteration < args.train_iters:
        progress = Progress(progress.iteration + 1, progress.consumed_samples + args.global_batch_size)
        run.train_iteration(progress.iteration, train_data)
        is_last = progress.iteration == args.train_iters
        if args.eval_iters and (is_last or progress.iteration % args.eval_interval == 0):
            run.evaluate(progress.iteration, valid_data)
        if args.save and (is_last or (args.save_interval and progress.iteration % args.save_interval == 0)):
            folder = save_checkpoint(args, run.state, progress)
            run.reporter.say(f"saved checkpoint {folder}")


class _Run:
    """One job's loop body, with what stays the same between iterations."""

    def __init__(
        self,
        args: argparse.Namespace,
        forward_step: ForwardStep,
        schedule: Any,
        state: TrainingState,
        reporter: Reporter,
    ) -> None:
        self.args = args
        self.forward_step = forward_step
        self.schedule = schedule
        self.state = state
        self.reporter = reporter

    def train_iteration(self, iteration: int, data: Iterator[Any] | None) -> IterationMetrics:
        """Forward, backward and optimizer step of one global batch."""
        started = time.perf_counter()
        learning_rate = self.state.optimizer.param_groups[0]["lr"]
        if self.args.hidden_dropout:
            # Seeding by iteration makes dropout the same after a resume, without saving random states.
            seed_random_states(self.args.seed + 1_000_003 * iteration)
        for chunk in self.state.model:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.state.optimizer.zero_grad()
        losses = self._run_schedule(data, forward_only=False)
        _, grad_norm, _ = self.state.optimizer.step()
        self.state.scheduler.step(increment=self.args.global_batch_size)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        metrics = gather_metrics(
            self.args,
            iteration=iteration,
            losses=losses,
            grad_norm=grad_norm,
            elapsed_ms=(time.perf_counter() - started) * 1e3,
            learning_rate=learning_rate,
            trace=self.schedule.trace,
        )
        self.reporter.report(metrics)
        self.reporter.write_timeline(iteration, self.schedule.plan, self.schedule.trace)
        if not math.isfinite(metrics.lm_loss) or not math.isfinite(grad_norm or 0.0):
            raise ValueError(
                f"iteration {iteration}: lm loss {metrics.lm_loss}, gradient norm {grad_norm}: training has "
                "diverged; lower --lr, lengthen --lr-warmup-iters or check the data"
            )
        return metrics

    def evaluate(self, iteration: int, data: Iterator[Batch] | None) -> float:
        """Mean loss over ``--eval-iters`` validation batches."""
        for chunk in self.state.model:
            chunk.eval()
        losses: list[dict[str, torch.Tensor]] = []
        with torch.no_grad():
            for _ in range(self.args.eval_iters):
                losses += self._run_schedule(data, forward_only=True)
        for chunk in self.state.model:
            chunk.train()
        loss = mean_loss(losses)
        perplexity = math.exp(min(20.0, loss))
        self.reporter.say(
            f" validation loss at iteration {iteration} | lm loss value: {loss:.6E} | "
            f"lm loss PPL: {perplexity:.6E}"
        )
        return loss

    def _run_schedule(
        self, data: Iterator[Any] | None, *, forward_only: bool
    ) -> list[dict[str, torch.Tensor]]:
        chunks = self.state.model
        return self.schedule(
            forward_step_func=self.forward_step,
            data_iterator=chunk_iterators(data, chunks),
            model=chunks,
            num_microbatches=self.args.num_microbatches,
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=forward_only,
        )


def _announce(args: argparse.Namespace, progress: Progress, reporter: Reporter) -> None:
    tp, pp, dp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.data_parallel_size
    if args.choice is not None:
        reporter.say(args.choice)
    batch = f"{args.num_microbatches} micro batches of {args.micro_batch_size} x {args.seq_length} tokens"
    if args.pipeline_schedule == ELASTIC:
        batch = f"batches of {args.global_batch_size} documents of at most {args.max_seq_length} tokens"
    reporter.say(
        f"{args.pipeline_schedule}: {args.world_size} ranks = tensor {tp} x pipeline {pp} x data {dp}; "
        f"{batch}; "
        f"{args.dataset.num_tokens} tokens in {args.dataset.num_documents} documents, "
        f"vocabulary {args.dataset.vocab_size}"
    )
    if progress.iteration:
        reporter.say(f"going on from iteration {progress.iteration} of {args.load}")
