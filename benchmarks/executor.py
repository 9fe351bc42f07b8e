"""What the executor itself costs, beside torch's Schedule1F1B and per operation.

    python benchmarks/executor.py --ranks 2

Every rank is a process; messages travel over gloo. Processor time is counted, so that waiting for a peer does
not: the thread of the rank, and all threads of its process, to which gloo's own belong.

First, both run 1F1B over the same stages, a small linear layer each, in turn: everything between the start
and the end of an iteration counts. Beside them runs what neither can be below: the layers and messages alone.
Then plans whose operations compute nothing, with messages of eight bytes,
by kind of operation. At last a toy plan runs many times while the process's memory is watched.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import mse_loss

from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.ranges import REPEATS, Whole
from helixpipe.plan import Plan, ScheduleRequest, build_plan
from helixpipe.runtime.communicator import TorchCommunicator
from helixpipe.runtime.executor import Executor, Segments
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.steps import Step
from helixpipe.runtime.trace import NullClock, Trace
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

SCHEDULES = ("1f1b", "zb-h1", "helix")
MICRO_BATCHES = 32
WIDTH, ROWS = 16, 4
_ROUNDS = 9


class LinearSegments:
    """One linear layer on each rank, and the mean square of the last one's distance from a target."""

    lending = None
    contexts = None

    def __init__(self, plan: Plan, rank: int, data: Tensor) -> None:
        self.last = plan.num_segments - 1
        self.weight_gradients = DeferredWeightGradients()
        self.layer = _stage(rank)
        self._data = data.split(ROWS)
        self._layout = MessageLayout((torch.Size((ROWS, WIDTH)),), torch.float32)

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        return self._layout

    def forward(self, segment: int, micro_batch: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        (hidden,) = inputs or (self._data[micro_batch],)
        output = self.layer(hidden)
        if segment < self.last:
            return (output,)
        return (mse_loss(output, self._data[micro_batch]),)


def _stage(rank: int) -> torch.nn.Linear:
    torch.manual_seed(rank)
    return torch.nn.Linear(WIDTH, WIDTH)


class Spent(NamedTuple):
    """Microseconds of processor time per compute operation."""

    thread: float
    process: float


class EmptySegments:
    """Hands on one number, without a graph of more than one node."""

    lending = None
    contexts = None

    def __init__(self, plan: Plan) -> None:
        self.last = plan.num_segments - 1
        self.weight_gradients = DeferredWeightGradients()
        self._layout = MessageLayout((torch.Size((1,)),), torch.float64)
        self._start = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        return self._layout

    def forward(self, segment: int, micro_batch: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        (hidden,) = inputs or (self._start,)
        return (hidden.sum() if segment == self.last else hidden.view(1),)


class TimedExecutor(Executor):
    """Times each operation in microseconds of this thread's processor time, by kind."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.samples: dict[str, list[float]] = defaultdict(list)
        self.steps = [(op, self._timed(op.kind.value, step)) for op, step in self.steps]

    def _timed(self, name: str, step: Step) -> Step:
        def timed() -> None:
            started = time.thread_time_ns()
            step()
            self.samples[name].append((time.thread_time_ns() - started) / 1e3)

        return timed


def main() -> int:
    """Print the comparison, medians by kind and schedule, and the growth of memory."""
    options = build_parser().parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=_rank_main, args=(rank, options, f"file://{folder}/store"))
            for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    return int(any(process.exitcode for process in ranks))


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog="benchmark_executor", description="Measure the executor's own time.")
    parser.add_argument("--ranks", type=Whole(most=256), default=2)
    parser.add_argument("--iterations", type=REPEATS, default=200, help="timed, per schedule")
    parser.add_argument("--memory-iterations", type=Whole(least=10), default=10_000)
    return parser


def _rank_main(rank: int, options: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=rank,
        world_size=options.ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    _compare(rank, options)
    _time_kinds(rank, options)
    _watch_memory(rank, options)
    dist.destroy_process_group()


def _compare(rank: int, options: argparse.Namespace) -> None:
    """1F1B by torch and by the executor, in turn, on the same stages and data."""
    torch.manual_seed(0)
    data = torch.randn(MICRO_BATCHES * ROWS, WIDTH)
    plan = build_plan(
        "1f1b",
        ScheduleRequest(num_layers=options.ranks, num_ranks=options.ranks, num_microbatches=MICRO_BATCHES),
    )
    segments = LinearSegments(plan, rank, data)
    executor = _make(Executor, plan, segments)
    stage = _stage(rank)
    steps = {
        "torch Schedule1F1B": _torch_step(rank, options.ranks, stage, data),
        "helixpipe": executor.run,
        "layer and messages": _bare_step(rank, options.ranks, _stage(rank), data),
    }
    samples: dict[str, list[Spent]] = defaultdict(list)
    repeats = max(1, options.iterations // _ROUNDS)
    for name, step in [*steps.items(), *[*steps.items()] * _ROUNDS]:
        samples[name].append(_spent(step, repeats))
    for parameter, ours in zip(stage.parameters(), segments.layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-5, atol=1e-5)
    medians = {name: [statistics.median(c) for c in zip(*s[1:], strict=True)] for name, s in samples.items()}
    everyone: list[Any] = [None] * options.ranks
    dist.all_gather_object(everyone, medians)
    if rank == 0:
        _print_comparison(everyone)


def _torch_step(rank: int, ranks: int, stage: torch.nn.Module, data: Tensor) -> Callable[[], object]:
    schedule = Schedule1F1B(
        PipelineStage(stage, rank, ranks, torch.device("cpu")),
        MICRO_BATCHES,
        loss_fn=mse_loss,
        scale_grads=False,
    )
    arguments = {"target": data, "losses": []} if rank == ranks - 1 else {}
    return partial(schedule.step, *([data] if rank == 0 else []), **arguments)


def _bare_step(rank: int, ranks: int, layer: torch.nn.Module, data: Tensor) -> Callable[[], object]:
    """The same forwards, backwards and messages with nothing around them: what no executor can be below."""
    group, last = dist.group.WORLD, ranks - 1
    assert group is not None
    arriving = [torch.empty(ROWS, WIDTH) for _ in range(2 * MICRO_BATCHES)]
    targets = data.split(ROWS)

    def step() -> None:
        results, sent = [], []
        for i, target in enumerate(targets):
            hidden = target
            if rank > 0:
                group.recv([arriving[i]], rank - 1, i).wait()
                hidden = arriving[i].detach().requires_grad_()
            output = layer(hidden)
            results.append((hidden, output if rank < last else mse_loss(output, target)))
            if rank < last:
                sent.append(group.send([output.detach()], rank + 1, i))
        for i, (hidden, output) in enumerate(results, MICRO_BATCHES):
            grad = None
            if rank < last:
                grad = arriving[i]
                group.recv([grad], rank + 1, i).wait()
            output.backward(grad)
            if rank > 0:
                sent.append(group.send([hidden.grad], rank - 1, i))
        for handle in sent:
            handle.wait()

    return step


def _spent(step: Callable[[], object], repeats: int) -> Spent:
    dist.barrier()
    thread, process = time.thread_time(), time.process_time()
    for _ in range(repeats):
        step()
    per_operation = 1e6 / (repeats * 2 * MICRO_BATCHES)
    return Spent(
        (time.thread_time() - thread) * per_operation, (time.process_time() - process) * per_operation
    )


def _print_comparison(by_rank: list[dict[str, list[float]]]) -> None:
    print(
        f"1F1B, {len(by_rank)} ranks, {MICRO_BATCHES} micro batches: microseconds of processor time per "
        "compute operation, the rank's thread (all threads)"
    )
    print(f"{'':20}" + "".join(f"{f'rank {rank}':>14}" for rank in range(len(by_rank))))
    for name in by_rank[0]:
        cells = (f"{thread:.0f} ({process:.0f})" for thread, process in (row[name] for row in by_rank))
        print(f"{name:20}" + "".join(f"{cell:>14}" for cell in cells))
    torchs, ours, _ = by_rank[0]
    ratios = (row[ours][0] / row[torchs][0] for row in by_rank)
    print(f"{'ours over torch':20}" + "".join(f"{ratio:>14.2f}" for ratio in ratios))


def _time_kinds(rank: int, options: argparse.Namespace) -> None:
    if rank == 0:
        print("operations that compute nothing: microseconds of the rank's thread, median")
    for schedule in SCHEDULES:
        executor = _executor(TimedExecutor, schedule, options.ranks)
        started = time.thread_time()
        for _ in range(options.iterations):
            executor.run()
        total_us = (time.thread_time() - started) * 1e6
        count = options.iterations * len(executor.plan.orders[rank])
        if rank == 0:
            kinds = ", ".join(f"{k} {statistics.median(v):.0f}" for k, v in sorted(executor.samples.items()))
            every = statistics.median(value for values in executor.samples.values() for value in values)
            print(f"{schedule:6} {every:4.0f} per operation, {total_us / count:4.0f} on average; {kinds}")


def _watch_memory(rank: int, options: argparse.Namespace) -> None:
    """Python's allocations after a tenth of the iterations and after all of them."""
    executor = _executor(Executor, "helix", options.ranks)
    tracemalloc.start()
    held = []
    for number in range(options.memory_iterations):
        executor.run()
        if number + 1 in (options.memory_iterations // 10, options.memory_iterations):
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    if rank == 0:
        print(
            f"memory: {held[0]} bytes of Python objects after {options.memory_iterations // 10} iterations, "
            f"{held[1]} after {options.memory_iterations}"
        )


def _executor(kind: type[Executor], schedule: str, ranks: int) -> Any:
    request = ScheduleRequest(num_layers=ranks, num_ranks=ranks, num_microbatches=2 * ranks)
    plan = build_plan(schedule, request)
    return _make(kind, plan, EmptySegments(plan))


def _make(kind: type[Executor], plan: Plan, segments: Segments) -> Executor:
    return kind(
        plan,
        segments,
        TorchCommunicator(dist.group.WORLD),
        device=torch.device("cpu"),
        trace=Trace(NullClock()),
    )


if __name__ == "__main__":
    sys.exit(main())
