"""Rounds one after the other against interlocked rounds, executed in simulated time.

    python benchmarks/rounds.py --num-microbatches 32

As in overlap.py, every rank is a process with its own executor and real messages, and operations sleep. How
long they take is what the cost model says of a model on a machine, scaled down: not by too much, since what
the executor itself takes, about a millisecond an operation on a busy CPU, does not get shorter. Each order
recomputes as little as fits the memory limit; ``--recompute`` gives all the same.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from overlap import Case, run_on_processes

from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.ranges import REPEATS, Real, Whole
from helixpipe.plan import Plan, ScheduleRequest, build_plan
from helixpipe.plan.build import complete
from helixpipe.plan.cost_model import (
    HARDWARE,
    MODELS,
    Pieces,
    Recompute,
    Workload,
    costs_of_plan,
    predict_pieces,
)
from helixpipe.plan.cost_model.levels import LEVELS
from helixpipe.plan.schedules.request import KnownCosts
from helixpipe.plan.simulation.costs import ANY_EDGE, Costs, SegmentCost
from helixpipe.plan.simulation.memory import peak_bytes

BASELINE = "filo"
CONTENDERS = {
    BASELINE: {"num_fold": 2},
    "interlocked": {"num_fold": 1, "round_order": "interlocked"},
    "interlocked-w": {"num_fold": 1, "round_order": "interlocked", "split_weight_gradients": True},
}
PLACEMENT = {"attention_range": "block", "head_placement": "spread"}


def main() -> int:
    """Run the benchmark; 2 with one line on stderr if nothing fits."""
    options = build_parser().parse_args()
    try:
        cases = [_case(name, options) for name in options.orders]
    except ValueError as error:
        print(f"benchmark_rounds: error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.model}, {options.seq_length} tokens, tensor {options.tensor_parallel} x pipeline "
        f"{options.ranks} {options.hardware}, {options.num_microbatches} micro batches; times x "
        f"{options.scale:g}; median of {options.iterations} iterations"
    )
    medians = run_on_processes(options, cases)
    if medians is None:
        return 1
    for name, ms in medians.items():
        print(f"{name}: {medians[next(iter(medians))] / ms:.3f}x {next(iter(medians))}")
    return 0


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog="benchmark_rounds", description="Compare orders of helix's rounds.")
    parser.add_argument("--orders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--model", choices=MODELS, default="gpt-7b")
    parser.add_argument("--hardware", choices=HARDWARE, default="h20")
    parser.add_argument("--seq-length", type=Whole(most=2**24), default=131072)
    parser.add_argument("--tensor-parallel", type=Whole(most=64), default=8)
    parser.add_argument("--ranks", type=Whole(most=64), default=8)
    parser.add_argument("--num-microbatches", type=Whole(most=1024), default=32)
    parser.add_argument(
        "--recompute", choices=[level.value for level in LEVELS], help="default: the least that fits"
    )
    parser.add_argument("--memory-limit-gib", type=Real(above=0.0, most=1e6), default=91.0)
    parser.add_argument("--scale", type=Real(above=0.0, most=1.0), default=0.5, help="of all times")
    parser.add_argument("--message-kib", type=Whole(most=2**20), default=16)
    parser.add_argument("--iterations", type=REPEATS, default=1, help="measured, after one that is not")
    return parser


def _case(name: str, options: argparse.Namespace) -> Case:
    model = MODELS[options.model]
    workload = Workload(model=model, seq_length=options.seq_length, tensor_parallel=options.tensor_parallel)
    pieces = predict_pieces(workload, HARDWARE[options.hardware])
    levels = LEVELS if options.recompute is None else (Recompute(options.recompute),)
    limit = int(options.memory_limit_gib * 2**30)
    request = ScheduleRequest(
        num_layers=model.num_layers,
        num_ranks=options.ranks,
        num_microbatches=options.num_microbatches,
        **PLACEMENT,
        **CONTENDERS[name],
    )
    for level in levels:
        plan = _plan(request, pieces, level, limit)
        costs = costs_of_plan(pieces, plan, level)
        if max(peak_bytes(plan, costs)) <= limit:
            scaled = _scaled(costs, plan, options.scale)
            return Case(f"{name}, {level.value}", scaled.p2p_ms[ANY_EDGE], complete(plan, scaled), scaled)
    raise ValueError(f"{name} does not fit into {options.memory_limit_gib:g} GiB; raise --memory-limit-gib")


def _plan(request: ScheduleRequest, pieces: Pieces, level: Recompute, limit: int) -> Plan:
    if request.round_order == "interlocked":
        known = KnownCosts(lambda plan: costs_of_plan(pieces, plan, level), limit)
        request = replace(request, costs=known)
    return build_plan("helix", request, compute_only=True)


def _scaled(costs: Costs, plan: Plan, scale: float) -> Costs:
    """Shorter times, and every message as long as the longest; what ranks pay once is left out."""
    assert costs.network is not None
    assert costs.message_bytes is not None
    longest = max(costs.message_bytes.values())
    ms = max(
        costs.network.transfer_ms(longest, sender, receiver)
        for sender in range(plan.num_ranks)
        for receiver in range(plan.num_ranks)
        if sender != receiver
    )
    segments = {
        name: SegmentCost(cost.forward * scale, cost.backward * scale, cost.weight * scale)
        for name, cost in costs.segments.items()
    }
    return Costs(segments, {ANY_EDGE: ms * scale})


if __name__ == "__main__":
    sys.exit(main())
