"""Execute plans in simulated time: the real executor and real messages, with sleep in place of computation.

    python benchmarks/overlap.py --ranks 8 --message-units 0 2

Every rank is a process with its own executor; tensors travel over gloo. An operation sleeps for as long as
the costs say, so many ranks fit on a few cores, and what is measured is what the executor adds: waits that
the plan does not have, messages that are not hidden. A message arrives a given time after it was sent,
however fast the wire was. The simulator predicts the same plan with the same costs.

Per layer, a forward takes one unit before attention, two for attention, one after it. The input gradient of
the weighted parts takes as long, that of attention twice as long; weight gradients as long as the forward.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import statistics
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor

from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.ranges import LAYERS, REPEATS, Real, Whole
from helixpipe.plan import Plan, ScheduleRequest, build_plan
from helixpipe.plan.build import complete, find_schedule
from helixpipe.plan.execution import Execution
from helixpipe.plan.simulation.costs import ANY_EDGE, Costs, SegmentCost
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.runtime.communicator import Communicator, Handle, TorchCommunicator
from helixpipe.runtime.executor import Executor, Tensors
from helixpipe.runtime.lending import WeightLending
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.trace import HostClock, Trace
from helixpipe.runtime.weight_gradients import DeferredWeightGradients

PRE, ATTENTION, POST = 1.0, 2.0, 1.0  # units of a forward
_AWAKE_S = 4e-4  # longer than sleeping usually overshoots, short beside an operation
CONTENDERS = {
    "1f1b": ("1f1b", {}),
    "zb-h1": ("zb-h1", {}),
    "helix-1": ("helix", {"num_fold": 1}),
    "helix-2": ("helix", {"num_fold": 2}),
}


class Case(NamedTuple):
    """One plan with one set of costs."""

    name: str
    message_ms: float
    plan: Plan
    costs: Costs


class Sample(NamedTuple):
    """One iteration on one rank, in milliseconds: the last end after the common start, and time in waits."""

    end_ms: float
    wait_ms: float


class SleepingSegments:
    """Segments that take the time that the costs give them, and count how often a tensor was handed on."""

    def __init__(self, case: Case, message_elements: int) -> None:
        self.plan, self.costs = case.plan, case.costs
        self.weight_gradients = DeferredWeightGradients()
        self.lending: WeightLending | None = None
        self.contexts = None
        if case.plan.loans:
            # Weights in name only: they travel, and their gradients return.
            weight, shape = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)), torch.Size((1,))
            self.lending = WeightLending(lambda _: [weight], lambda _: [shape], weight.dtype, weight.dtype)
        self._layout = MessageLayout((torch.Size((message_elements,)),), torch.float64)

    def layout(self, edge: int, micro_batch: int) -> MessageLayout:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        return self._layout

    def forward(self, segment: int, micro_batch: int, inputs: Tensors) -> Tensors:
        """See :class:`helixpipe.runtime.executor.Segments`."""
        if inputs:
            (hidden,) = inputs
        else:
            hidden = torch.full(self._layout.shapes[0], float(micro_batch), dtype=torch.float64)
            hidden.requires_grad_()
            hidden.register_hook(self._check_gradient)
        cost = self.costs.segments[self.plan.cost_name(segment, micro_batch)]
        hidden = _Sleep.apply(hidden, cost, self.weight_gradients)
        if segment + 1 < self.plan.num_segments:
            return (hidden,)
        assert bool((hidden == micro_batch + self.plan.num_segments).all()), "a message was lost or swapped"
        return (hidden.sum(),)

    def _check_gradient(self, gradient: Tensor) -> None:
        assert bool((gradient == 1 + self.plan.num_segments).all()), "a gradient was lost or swapped"


class _Sleep(torch.autograd.Function):
    """Adds one in either direction, slowly."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, cost: SegmentCost, queue: DeferredWeightGradients) -> Tensor:
        ctx.cost, ctx.queue = cost, queue
        started = time.perf_counter()
        result = hidden + 1
        _sleep_until(started + cost.forward / 1e3)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        started = time.perf_counter()
        result = gradient + 1
        _sleep_until(started + ctx.cost.backward / 1e3)
        if ctx.cost.weight:
            ctx.queue.add(partial(_sleep, ctx.cost.weight))
        return result, None, None


def _sleep_until(instant: float) -> None:
    """Sleep, but be awake for the last moment: a core that sleeps takes a while to wake up."""
    time.sleep(max(0.0, instant - time.perf_counter() - _AWAKE_S))
    while time.perf_counter() < instant:
        pass


def _sleep(ms: float) -> None:
    _sleep_until(time.perf_counter() + ms / 1e3)


class DelayedCommunicator:
    """A communicator whose messages arrive ``delay_ms`` after they were sent and their receives posted.

    Like NCCL's, a message travels from when both ranks have it. They arrive later if the wire is slower. The
    time of sending travels with the message, by a clock that all processes of a machine share.
    """

    def __init__(self, inner: Communicator, delay_ms: float) -> None:
        self.inner, self.delay_ms = inner, delay_ms
        self.rank, self.size = inner.rank, inner.size

    def send(self, buffer: Tensor, peer: int, tag: int) -> Handle:
        """See :class:`helixpipe.runtime.communicator.Communicator`."""
        stamped = torch.cat([buffer.new_tensor([time.perf_counter()]), buffer])
        return _Sent(self.inner.send(stamped, peer, tag), stamped)

    def receive(self, buffer: Tensor, peer: int, tag: int) -> Handle:
        """See :class:`helixpipe.runtime.communicator.Communicator`."""
        stamped = buffer.new_empty(len(buffer) + 1)
        posted = time.perf_counter()
        return _Delayed(self.inner.receive(stamped, peer, tag), stamped, buffer, posted, self.delay_ms)


class _Sent(NamedTuple):
    handle: Handle
    stamped: Tensor  # must live until the message is gone

    def wait(self) -> None:
        self.handle.wait()

    def is_completed(self) -> bool:
        return self.handle.is_completed()


class _Delayed(NamedTuple):
    handle: Handle
    stamped: Tensor
    buffer: Tensor
    posted: float
    delay_ms: float

    def wait(self) -> None:
        self.handle.wait()
        self.buffer.copy_(self.stamped[1:])
        _sleep_until(max(float(self.stamped[0]), self.posted) + self.delay_ms / 1e3)

    def is_completed(self) -> bool:
        return False  # the message is delayed by whoever waits for it


def main() -> int:
    """Run the benchmark; 2 with one line on stderr if the arguments do not fit together."""
    options = _options()
    try:
        cases = [_case(name, units, options) for units in options.message_units for name in options.schedules]
    except ValueError as error:
        print(f"benchmark_overlap: error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.ranks} ranks, {options.num_layers} layers, {options.num_microbatches} micro batches; "
        f"unit {options.unit_ms:g} ms, messages of {options.message_kib} KiB; "
        f"median of {options.iterations} iterations"
    )
    return int(run_on_processes(options, cases) is None)


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog="benchmark_overlap", description="Compare executed with simulated time.")
    parser.add_argument("--schedules", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--ranks", type=Whole(most=256), default=8)
    parser.add_argument("--num-layers", type=LAYERS, help="default: one per rank")
    parser.add_argument("--num-microbatches", type=Whole(), help="default: 2 per rank")
    parser.add_argument("--unit-ms", type=Real(above=0.0, most=1e6), default=20.0)
    parser.add_argument(
        "--message-units",
        type=Real(least=0.0, most=1e6),
        nargs="+",
        default=[0.0, 2.0],
        help="time of a message, each is run",
    )
    parser.add_argument("--message-kib", type=Whole(most=2**20), default=64)
    parser.add_argument("--iterations", type=REPEATS, default=5, help="measured, after one that is not")
    return parser


def _options() -> argparse.Namespace:
    options = build_parser().parse_args()
    options.num_layers = options.num_layers or options.ranks
    options.num_microbatches = options.num_microbatches or 2 * options.ranks
    return options


def _case(name: str, message_units: float, options: argparse.Namespace) -> Case:
    schedule, arguments = CONTENDERS[name]
    request = ScheduleRequest(
        num_layers=options.num_layers,
        num_ranks=options.ranks,
        num_microbatches=options.num_microbatches,
        **arguments,
    )
    plan = build_plan(schedule, request, compute_only=True)
    unit = options.unit_ms
    weighted = {"first": PRE, "middle": PRE + POST, "last": POST}
    costs = {part: SegmentCost(t * unit, t * unit, t * unit) for part, t in weighted.items()}
    costs["attention"] = SegmentCost(ATTENTION * unit, 2 * ATTENTION * unit, 0.0)
    if find_schedule(schedule).execution is not Execution.SEGMENTS:
        layers = options.num_layers / plan.num_segments * unit
        whole = SegmentCost(
            (PRE + ATTENTION + POST) * layers, (PRE + 2 * ATTENTION + POST) * layers, (PRE + POST) * layers
        )
        costs = dict.fromkeys(plan.segment_names, whole)
    known = Costs(costs, {ANY_EDGE: message_units * unit})
    return Case(name, message_units * unit, complete(plan, known), known)


def run_on_processes(options: argparse.Namespace, cases: list[Case]) -> dict[str, float] | None:
    """Measure and report each case.

    Args:
        options: ``ranks``, ``iterations`` and ``message_kib``.
        cases: by a name each.

    Returns:
        The median of every case in milliseconds; None if a rank has failed, which says why itself.
    """
    width = max(9, *(len(case.name) for case in cases))
    print(
        f"{'schedule':{width}} {'message ms':>10} {'simulated ms':>13} {'measured ms':>12} {'ratio':>7}"
        f" {'range':>15}  waits per rank ms, simulated and measured",
        flush=True,
    )
    medians: dict[str, float] = {}
    # Forked from a process that has imported torch and done nothing with it: ranks start at once.
    context = multiprocessing.get_context("fork")
    results: Any = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank_main, args=(rank, options, cases, f"file://{folder}/store", results))
            for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        failed = False
        for case in cases:
            samples = results.get()
            if samples is None:
                failed = True
                break
            medians[case.name] = _report(case, samples, width)
        for process in ranks:
            if failed:
                process.terminate()
            process.join()
    return None if failed else medians


def _rank_main(rank: int, options: argparse.Namespace, cases: list[Case], store: str, results: Any) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    try:
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=options.ranks, timeout=timeout
        )
        for case in cases:
            samples = _measure(case, options)
            if rank == 0:
                results.put(samples)
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        traceback.print_exc()
        results.put(None)


def _measure(case: Case, options: argparse.Namespace) -> list[list[Sample]]:
    communicator = TorchCommunicator(dist.group.WORLD)
    executor = Executor(
        case.plan,
        SleepingSegments(case, options.message_kib * 1024 // 8),
        DelayedCommunicator(communicator, case.message_ms),
        device=torch.device("cpu"),
        trace=Trace(HostClock()),
    )
    rows = []
    for _ in range(options.iterations + 1):
        started = _start_together()
        executor.run()
        end_ms = (time.perf_counter() - started) * 1e3
        assert tuple(executor.trace.operations) == case.plan.orders[communicator.rank]
        wait_ms = sum(wait.end_ms - wait.start_ms for wait in executor.trace.waits())
        row: list[Any] = [None] * options.ranks
        dist.all_gather_object(row, Sample(end_ms, wait_ms))
        rows.append(row)
    return rows[1:]


def _start_together() -> float:
    """Sleep until an instant that is the same on all ranks; the instant."""
    instant = torch.tensor([time.perf_counter() + 0.05], dtype=torch.float64)
    dist.all_reduce(instant, op=dist.ReduceOp.MAX)
    _sleep_until(float(instant))
    return float(instant)


def _report(case: Case, samples: list[list[Sample]], width: int) -> float:
    simulation = simulate(case.plan, case.costs).timeline
    expected = simulation.makespan_ms
    ends = [max(sample.end_ms for sample in ranks) for ranks in samples]
    ratios = sorted(end / expected for end in ends)
    planned = sum(wait.end_ms - wait.start_ms for waits in simulation.waits for wait in waits)
    waited = statistics.median(sum(sample.wait_ms for sample in ranks) for ranks in samples)
    print(
        f"{case.name:{width}} {case.message_ms:10.1f} {expected:13.1f} {statistics.median(ends):12.1f} "
        f"{statistics.median(ratios):7.4f} {ratios[0]:7.4f}-{ratios[-1]:.4f}  "
        f"{planned / len(simulation.spans):.0f} {waited / len(simulation.spans):.0f}",
        flush=True,
    )
    return statistics.median(ends)


if __name__ == "__main__":
    sys.exit(main())
