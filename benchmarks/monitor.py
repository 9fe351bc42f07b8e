"""What watching costs: records of progress, headers of messages, the plan's hash, and the sentinels.

    python benchmarks/monitor.py --iteration-ms 2000

Counts the turns and messages of a helix job's plan, times each, and sets the sum against an iteration.
Sentinels are processes of their own: their processor time is measured over some seconds of four of them that
report to a hub.
"""

from __future__ import annotations

import mmap
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch

from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.ranges import Real
from helixpipe.plan import Plan, ScheduleRequest, build_plan
from helixpipe.reliability.deadlines import Deadlines
from helixpipe.reliability.monitor import Monitor
from helixpipe.reliability.record import RECORD_BYTES, SharedProgress
from helixpipe.runtime.header import HeaderCheck, Message
from helixpipe.runtime.message import MessageLayout

# A helix job of four ranks.
REQUEST = ScheduleRequest(num_layers=8, num_ranks=4, num_microbatches=8)
_ROUNDS = 20_000
_OTHERS = 3  # sentinels beside the hub's


def main() -> int:
    """Print one line per cost, then the share of an iteration."""
    options = build_parser().parse_args()
    plan = build_plan("helix", REQUEST)
    order = max(plan.orders, key=len)
    receives = sum(op.kind.is_receive for op in order)
    sends = sum(op.kind.is_send for op in order)
    # Each operation begins; a receive is waited for and resumed, and so is a send at the latest at the end.
    turns = len(order) + 2 * (receives + sends) + 1
    turn_us, write_us, compare_us = _turn_us(plan), *_header_us()
    total_ms = (turns * turn_us + sends * write_us + receives * compare_us) / 1e3
    print(f"record: {turn_us:.2f} us, {turns} times on the busiest rank")
    print(f"header: {write_us:.1f} us to write, {compare_us:.1f} us to compare, {sends} and {receives} times")
    share = total_ms / options.iteration_ms
    print(f"rank's own thread: {total_ms:.2f} ms, {share:.3%} of an iteration")
    started = time.perf_counter()
    assert plan.fingerprint
    print(f"hash of the plan, once per job: {(time.perf_counter() - started) * 1e3:.1f} ms")
    share = _sentinel_share(options.seconds)
    print(f"sentinels: {share:.2%} of a core for the hub's and {_OTHERS} others together")
    return 0


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog="benchmark_monitor", description="Measure what watching a job costs.")
    parser.add_argument(
        "--iteration-ms", type=Real(above=0.0), required=True, help="of the job that is watched"
    )
    parser.add_argument(
        "--seconds", type=Real(above=0.0, most=86400.0), default=10.0, help="to watch the sentinels for"
    )
    return parser


def _per_call_us(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        call()
    return (time.perf_counter() - started) / _ROUNDS * 1e6


def _turn_us(plan: Plan) -> float:
    progress = SharedProgress(mmap.mmap(-1, RECORD_BYTES))
    operation = plan.orders[0][0]
    return _per_call_us(lambda: progress.begin(operation))


def _header_us() -> tuple[float, float]:
    layout = MessageLayout((torch.Size((16, 16)),), torch.float32)
    message = Message(build_plan("helix", REQUEST).orders[0][0], 5, layout)
    check = HeaderCheck(1, [message], torch.device("cpu"))
    buffer = layout.empty(torch.device("cpu"))
    return _per_call_us(lambda: check.write(0, buffer)), _per_call_us(lambda: check.compare(0, buffer))


def _sentinel_share(seconds: float) -> float:
    """Processor time of the hub's sentinel and of three others, over wall time."""
    own = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        monitors = [
            Monitor(
                rank,
                1 + _OTHERS,
                program="benchmark",
                stack_folder=Path(folder),
                deadlines=Deadlines(first_s=600.0),
            )
            for rank in range(1 + _OTHERS)
        ]
        address = monitors[0].address(["localhost"])
        for monitor in monitors:
            monitor.join(address)
        before = _processor_s(own.children())
        time.sleep(seconds)
        share = (_processor_s(own.children()) - before) / seconds
        for monitor in monitors:
            monitor.close()
    return share


def _processor_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


if __name__ == "__main__":
    sys.exit(main())
