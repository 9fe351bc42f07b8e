"""What the executor itself costs: processor time per operation when the operations compute nothing.

    python benchmarks/executor.py --ranks 2

Every rank is a process; messages of eight bytes travel over gloo. Each operation is timed on the rank's own
thread, in processor time, so that waiting for a peer does not count. Also runs a toy plan many times and
watches the process's memory.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import multiprocessing
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor

from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.ranges import REPEATS, Whole
from helixpipe.plan import Plan, ScheduleRequest, build_plan
from helixpipe.runtime.communicator import TorchCommunicator
from helixpipe.runtime.executor import Executor
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.steps import Step
from helixpipe.runtime.trace import NullClock, Trace
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

SCHEDULES = ("1f1b", "zb-h1", "helix")


class EmptySegments:
    """Hands on one number, without a graph of more than one node."""

    lending = None

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
        self._posts = [self._timed("post", post) for post in self._posts]

    def _timed(self, name: str, step: Step) -> Step:
        def timed() -> None:
            started = time.thread_time_ns()
            step()
            self.samples[name].append((time.thread_time_ns() - started) / 1e3)

        return timed


def main() -> int:
    """Print medians by kind and schedule, then the growth of memory."""
    options = build_parser().parse_args()
    print(f"{options.ranks} ranks, {options.iterations} iterations; microseconds of processor time, median")
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
    _watch_memory(rank, options)
    dist.destroy_process_group()


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
    return kind(
        plan,
        EmptySegments(plan),
        TorchCommunicator(dist.group.WORLD),
        device=torch.device("cpu"),
        trace=Trace(NullClock()),
    )


if __name__ == "__main__":
    sys.exit(main())
