"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from helixpipe.megatron_adapter.schedule import ForwardBackward, chunk_iterators, make_forward_backward
from helixpipe.reliability.exit_codes import DataError, NumericsError
from helixpipe.reliability.monitor import Monitor
from helixpipe.runtime.trace import NullClock, default_clock
from megatron.pretrain.checkpoint.checkpoint import Loaded, Progress, load_checkpoint, load_weights
from megatron.pretrain.checkpoint.files import is_same_folder
from megatron.pretrain.checkpoint.saver import Saver, SaveStatus
from megatron.pretrain.data.elastic_iterators import ElasticTraining, validation_batches
from megatron.pretrain.data.gpt import Batch, build_iterators
from megatron.pretrain.health.attention import attention_of_job
from megatron.pretrain.health.diagnosis import LayerSums
from megatron.pretrain.health.guards import (
    KeptBatches,
    NotFinite,
    explain,
    spread_to_gradients,
    watch_gradient_norm,
)
from megatron.pretrain.health.housekeeping import Housekeeping
from megatron.pretrain.health.memory_history import MemoryHistory
from megatron.pretrain.health.memory_report import MemoryWatch, explains_out_of_memory
from megatron.pretrain.health.monitoring import monitored
from megatron.pretrain.health.planned_end import PlannedEnd
from megatron.pretrain.health.preemption import StopRequest
from megatron.pretrain.health.replicas import check_replicas
from megatron.pretrain.health.second_computation import SecondComputation
from megatron.pretrain.initialize import finalize, initialize, seed_random_states
from megatron.pretrain.metrics import Planning, Reporter, gather_metrics, mean_loss
from megatron.pretrain.model import TrainingState, build_training_state, describe_attention
from megatron.pretrain.outputs import Outputs, own_outputs
from megatron.pretrain.scalars import Scalars
from megatron.pretrain.settings.job import JobSettings
from megatron.pretrain.step import take_step
from megatron.pretrain.step_profiler import StepProfiler

ForwardStep = Callable[..., Any]


def pretrain(
    settings: JobSettings, forward_step: ForwardStep, before_exit: Callable[[], None] = lambda: None
) -> int:
    """Train from the given arguments to ``--train-iters``, or until the scheduler asks to stop.

    If another rank is lost, fails or hangs, this process ends with a line that names it.

    Args:
        settings: from :func:`megatron.pretrain.settings.arguments.parse_arguments`.
        forward_step: Megatron's ``forward_step_func(data_iterator, model)``.
        before_exit: called before the process ends because of another rank.

    Returns:
        the job's exit code: 0, or 75 after a stop on request of the scheduler and 130 after Ctrl-C, saved if
        ``--save`` is given.

    Raises:
        ValueError: bad input found after the arguments were parsed.
        OutOfMemory: memory ran out; a ValueError, too.
        DataError: a checkpoint that cannot be loaded or saved.
        NumericsError: a loss or gradient that is not finite; the weights are those before the iteration.
        PeerLost: another rank has ended, and it is not known which.
    """
    with monitored(settings, before_exit) as monitor:
        initialize(settings, monitor)
        code = _train(settings, forward_step, monitor)
        monitor.enter("end")
        finalize()
    return code


@explains_out_of_memory
def _train(settings: JobSettings, forward_step: ForwardStep, monitor: Monitor) -> int:
    monitor.enter("outputs")
    with own_outputs(settings) as outputs:
        return _train_with(outputs, settings, forward_step, monitor)


def _train_with(outputs: Outputs, settings: JobSettings, forward_step: ForwardStep, monitor: Monitor) -> int:
    clock = default_clock() if settings.output.measures else NullClock()
    schedule, root = settings.schedule, outputs.load
    forward_backward = make_forward_backward(schedule.execution, schedule.plan, clock, monitor.progress)
    memory_history = MemoryHistory(
        settings.watching.memory_history, settings.parallel.rank, settings.output.log_interval
    )
    monitor.enter("build model")
    state = build_training_state(settings)
    backend, attention = describe_attention(settings, state)
    monitor.enter("load")
    loaded = load_checkpoint(settings, root, state) if root is not None else Loaded()
    pretrained = settings.checkpoint.pretrained_checkpoint
    if loaded.folder is None and pretrained is not None:
        loaded = load_weights(settings, pretrained, state)
    progress = loaded.progress
    reporter = Reporter(settings, progress.iteration)
    _announce(settings, loaded, reporter)
    reporter.say(attention_of_job(attention))
    monitor.enter("build data")
    scalars = Scalars(settings, progress.iteration)
    watchers = _Watchers(monitor, reporter, scalars, memory_history)
    run = _Run(settings, forward_step, forward_backward, state, backend, watchers)
    save = settings.checkpoint.save
    is_in_save = save is not None and root is not None and is_same_folder(root, save)
    saver = Saver(settings, reporter.say, outputs, loaded.folder if is_in_save else None, monitor)
    with closing(scalars):
        if schedule.execution.joins_documents:
            iterators = build_iterators(settings, progress.position, progress.evaluated_samples)
            return _iterate(run, saver, progress, *iterators)
        validation = validation_batches(settings, progress.evaluated_samples)
        with closing(ElasticTraining(settings, progress.position)) as batches:
            run.planning = batches.planning
            return _iterate(run, saver, progress, batches, validation)


def _iterate(
    run: _Run,
    saver: Saver,
    progress: Progress,
    train_data: Iterator[Any] | None,
    valid_data: Iterator[Any] | None,
) -> int:
    """Train to ``--train-iters`` or until asked to stop, with evaluations and checkpoints; the exit code."""
    training, checkpoint = run.settings.training, run.settings.checkpoint
    monitor, reporter = run.monitor, run.reporter
    memory = MemoryWatch(run.settings)
    request, end = StopRequest(), PlannedEnd(run.settings.ending)
    request.listen()
    data = None if train_data is None else KeptBatches(train_data)
    while progress.iteration < training.train_iters:
        progress = _after_batch(progress, training.global_batch_size)
        try:
            with run.profiler.around(progress.iteration):
                stops, statuses, overs = run.train_iteration(
                    progress, data, lambda: (request.exit_code, saver.status, end.is_over)
                )
        except NumericsError as error:
            # The save that is still under way is of an iteration that was in order.
            monitor.enter("save")
            try:
                saver.finish()
            except DataError as failure:
                raise NumericsError(f"{error}; {failure}") from None
            raise
        saver.poll([SaveStatus(status) for status in statuses])
        memory.check()
        is_last, must_stop = progress.iteration == training.train_iters, any(stops)
        is_eval_due = progress.iteration % training.eval_interval == 0
        if training.eval_iters and (is_last or is_eval_due) and not must_stop:
            loss = run.evaluate(progress.iteration, valid_data)
            run.scalars.evaluation(loss, progress.iteration, progress.consumed_samples)
            if is_eval_due:
                # The evaluation at the end is one more, which a longer job does not have.
                evaluated = progress.evaluated_samples + training.eval_iters * training.global_batch_size
                progress = progress._replace(evaluated_samples=evaluated)
        reason = end.reason(progress.iteration, is_over=any(overs))
        every = checkpoint.save_interval
        is_due = every is not None and progress.iteration % every == 0
        ends = must_stop or bool(reason)
        if checkpoint.save and (is_last or ends or is_due):
            monitor.enter("save")
            saver.save(run.state, progress, is_last=is_last or ends)
        if ends and not is_last:
            run.profiler.finish()
            if must_stop:
                reason = request.signal_name or "a signal on another rank"
            _announce_stop(checkpoint.save, progress, reason, reporter)
            return max(stops)
    reporter.say(reporter.planning_summary())
    reporter.say(memory.summary())
    reporter.say(reporter.summary())
    reporter.say(run.scalars.summary())
    return 0


def _after_batch(progress: Progress, global_batch_size: int) -> Progress:
    return progress._replace(
        iteration=progress.iteration + 1,
        consumed_samples=progress.consumed_samples + global_batch_size,
        position=progress.position + global_batch_size,
    )


def _announce_stop(save: Path | None, progress: Progress, reason: str, reporter: Reporter) -> None:
    if save is None:
        what = "nothing is saved, there is no --save"
    else:
        what = f"the same command with --load {save} goes on from there"
    reporter.say(f"stopped by {reason} after iteration {progress.iteration}: {what}")


class _Watchers(NamedTuple):
    """What is told of every iteration."""

    monitor: Monitor
    reporter: Reporter
    scalars: Scalars
    memory_history: MemoryHistory


class _Run:
    """One job's loop body, with what stays the same between iterations."""

    def __init__(
        self,
        settings: JobSettings,
        forward_step: ForwardStep,
        forward_backward: ForwardBackward,
        state: TrainingState,
        attention_backend: str,
        watchers: _Watchers,
    ) -> None:
        self.settings = settings
        self.forward_step = forward_step
        self.forward_backward = forward_backward
        self.state = state
        self.attention_backend = attention_backend
        self.monitor, self.reporter, self.scalars, self.memory_history = watchers
        self.planning: Callable[[], Planning | None] = lambda: None  # of the present iteration's plan
        self.sums = LayerSums(state.model, forward_backward.trace)
        self.profiler = StepProfiler(settings.profiling, settings.parallel.rank)
        self.second_computation = SecondComputation(
            state.model, forward_backward.trace, settings.health.check_layers_every
        )
        self.housekeeping = Housekeeping(settings.housekeeping)
        watch_gradient_norm(state.optimizer)

    def train_iteration(
        self, progress: Progress, data: KeptBatches | None, stop_flags: Callable[[], Sequence[int]]
    ) -> list[list[int]]:
        """Forward, backward and optimizer step of one global batch.

        Args:
            progress: at the end of the iteration.
            data: this rank's micro batches, or None where it reads none.
            stop_flags: what this rank has to tell the others at the iteration's end.

        Returns:
            for each of the stop_flags, what all ranks have told.
        """
        iteration = progress.iteration
        self.monitor.enter("step", iteration)
        started = time.perf_counter()
        learning_rate = get_canonical_lr_for_logging(self.state.optimizer.param_groups) or 0.0
        if data is not None:
            data.forget()
        self.sums.forget()
        with self.second_computation.watching(iteration):
            losses = self._compute_gradients(iteration, data)
        self.second_computation.check(iteration)
        every = self.settings.health.check_gradients_every
        if every is not None and iteration % every == 0:
            shards = self.settings.parallel.use_distributed_optimizer
            check_replicas(self.state.model, iteration, with_gradients=not shards)
        self.housekeeping.before_optimizer()
        self.monitor.reach("optimizer")
        try:
            step = take_step(self.settings, self.state)
        except NotFinite:
            raise self._explain(iteration, losses, data) from None
        if not step.is_skipped:
            self.state.scheduler.step(increment=self.settings.training.global_batch_size)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        metrics, told = gather_metrics(
            self.settings,
            attention_backend=self.attention_backend,
            iteration=iteration,
            consumed_samples=progress.consumed_samples,
            losses=losses,
            step=step,
            elapsed_ms=(time.perf_counter() - started) * 1e3,
            learning_rate=learning_rate,
            flops=self.reporter.flops,
            trace=self.forward_backward.trace,
            stop_flags=stop_flags(),
            planning=self.planning(),
        )
        if step.is_skipped and not math.isfinite(metrics.lm_loss):
            # No loss scale is low enough for it.
            raise self._explain(iteration, losses, data)
        self.reporter.report(metrics)
        self.scalars.iteration(metrics)
        self.memory_history.write(iteration)
        self.reporter.write_timeline(iteration, self.forward_backward.plan, self.forward_backward.trace)
        self.housekeeping.after_iteration(iteration)
        return told

    def _explain(
        self, iteration: int, losses: list[dict[str, torch.Tensor]], data: KeptBatches | None
    ) -> NumericsError:
        self.monitor.enter("diagnosis")
        again = None if data is None else data.again()
        return explain(
            self.settings.parallel, self.state, self.forward_backward, iteration, losses, self.sums,
            lambda: self._compute_gradients(iteration, again),
        )  # fmt: skip

    def _compute_gradients(
        self, iteration: int, data: Iterator[Batch] | None
    ) -> list[dict[str, torch.Tensor]]:
        """Forward and backward of one global batch, the same each time for the same weights and data."""
        if self.settings.model.hidden_dropout or self.settings.model.attention_dropout:
            # Seeding by iteration makes dropout the same after a resume, without saving random states.
            seed_random_states(self.settings.training.seed + 1_000_003 * iteration)
        for chunk in self.state.model:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.state.optimizer.zero_grad()
        return self._run_plan(spread_to_gradients(self.forward_step), data, forward_only=False)

    def evaluate(self, iteration: int, data: Iterator[Any] | None) -> float:
        """Mean loss over ``--eval-iters`` validation batches."""
        self.monitor.enter("evaluate")
        self.housekeeping.around_evaluation()
        for chunk in self.state.model:
            chunk.eval()
        losses: list[dict[str, torch.Tensor]] = []
        with torch.no_grad():
            for _ in range(self.settings.training.eval_iters):
                losses += self._run_plan(self.forward_step, data, forward_only=True)
        for chunk in self.state.model:
            chunk.train()
        self.housekeeping.around_evaluation()
        loss = mean_loss(losses)
        perplexity = math.exp(min(20.0, loss))
        self.reporter.say(
            f" validation loss at iteration {iteration} | lm loss value: {loss:.6E} | "
            f"lm loss PPL: {perplexity:.6E}"
        )
        return loss

    def _run_plan(
        self, forward_step: ForwardStep, data: Iterator[Any] | None, *, forward_only: bool
    ) -> list[dict[str, torch.Tensor]]:
        chunks, training = self.state.model, self.settings.training
        return self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=chunk_iterators(data, chunks, for_all=self.settings.data.ends_at_documents),
            model=chunks,
            num_microbatches=training.num_microbatches,
            seq_length=training.seq_length,
            micro_batch_size=training.micro_batch_size,
            forward_only=forward_only,
        )


def _announce(settings: JobSettings, loaded: Loaded, reporter: Reporter) -> None:
    parallel, training, dataset = settings.parallel, settings.training, settings.data.dataset
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    reporter.say(settings.needless_flags)
    reporter.say(settings.other_defaults)
    reporter.say(settings.schedule.reason)
    if settings.schedule.execution.joins_documents:
        each = f"{training.micro_batch_size} x {training.seq_length} tokens"
        batch = f"{training.num_microbatches} micro batches of {each}"
    else:
        longest = training.max_seq_length
        batch = f"batches of {training.global_batch_size} documents of at most {longest} tokens"
    shared = f"context {parallel.context_parallel_size} x " if parallel.context_parallel_size > 1 else ""
    source = "made-up data: " if settings.data.mock_data else ""
    reporter.say(
        f"{settings.schedule.name}: {parallel.world_size} ranks = tensor {tp} x pipeline {pp} x "
        f"{shared}data {parallel.data_parallel_size}; {batch}; "
        f"{source}{dataset.num_tokens} tokens in {dataset.num_documents} documents, "
        f"vocabulary {dataset.vocab_size}"
    )
    iteration = loaded.progress.iteration
    if loaded.folder is None:
        return
    if loaded.progress == Progress():
        reporter.say(f"starting from the weights of {loaded.folder}")
    else:
        reporter.say(f"going on from iteration {iteration} of {loaded.folder.parent}")
    if loaded.changes:
        reporter.say(f"changed since then: {', '.join(change.text for change in loaded.changes)}")
    if loaded.progress.position < loaded.progress.consumed_samples:
        reporter.say(f"at sample {loaded.progress.position} of another order than that of the first samples")
    if iteration >= training.train_iters:
        reporter.say(f"nothing to train: --train-iters {training.train_iters} is reached; give more to go on")
