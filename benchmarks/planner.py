"""How long planning and simulating take, by schedule and size.

    python benchmarks/planner.py

The sizes are those of the largest jobs; the last column shows that simulating grows with the operations.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.plan import ScheduleRequest, build_plan  # noqa: E402
from helixpipe.plan.cost_model import (  # noqa: E402
    HARDWARE,
    MODELS,
    ModelShape,
    Recompute,
    Workload,
    costs_of_plan,
    predict_pieces,
)
from helixpipe.plan.schedules import planned_ahead  # noqa: E402
from helixpipe.plan.simulation.simulate import simulate  # noqa: E402

# (ranks, layers, micro batches): 80 layers need a number of ranks that divides them.
SIZES = ((16, 80, 64), (16, 80, 256), (40, 80, 240), (64, 128, 256))


def build_parser() -> ScriptParser:
    """There are no options; it refuses what is given all the same."""
    return ScriptParser(prog="benchmark_planner", description=__doc__)


def main() -> None:
    """Print one line per schedule and size."""
    build_parser().parse_args()
    print(
        f"{'schedule':12} {'ranks':>5} {'layers':>6} {'m':>4} {'operations':>10} {'plan s':>7} "
        f"{'simulate s':>10} {'us/operation':>12}"
    )
    for ranks, layers, m in SIZES:
        shape = ModelShape(**{**MODELS["llama-70b"].__dict__, "num_layers": layers})
        pieces = predict_pieces(Workload(model=shape, seq_length=131072, tensor_parallel=8), HARDWARE["h100"])
        for schedule in planned_ahead():
            request = ScheduleRequest(num_layers=layers, num_ranks=ranks, num_microbatches=m)
            started = time.perf_counter()
            try:
                plan = build_plan.__wrapped__(schedule, request)
            except ValueError:
                continue  # sizes that this schedule cannot divide
            planned = time.perf_counter()
            simulate(plan, costs_of_plan(pieces, plan, Recompute.NONE))
            simulated = time.perf_counter()
            count = sum(op.kind.is_compute for order in plan.orders for op in order)
            print(
                f"{schedule:12} {ranks:5} {layers:6} {m:4} {count:10} {planned - started:7.2f} "
                f"{simulated - planned:10.2f} {(simulated - planned) / count * 1e6:12.1f}"
            )


if __name__ == "__main__":
    main()
