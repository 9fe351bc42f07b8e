"""What an elastic plan gains on a skewed batch, and how long checkpointing takes to solve.

    python benchmarks/elastic_planning.py

The first table holds an elastic plan against others with ideal costs, over memory limits; the second times
single calls of the solver, and whole plans, for about 300 and 750 chunks.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.elastic import ElasticJob, ideal_costs, plan_batch, predict_baselines  # noqa: E402
from helixpipe.elastic.chunk_schedule import order_chunks  # noqa: E402
from helixpipe.elastic.sample import short_tailed_lengths, skewed_lengths  # noqa: E402
from helixpipe.elastic.search.grouping import group_sequences  # noqa: E402
from helixpipe.elastic.search.planner import solve  # noqa: E402
from helixpipe.elastic.search.sequence_processor import equal_time_mesh, make_chunks  # noqa: E402

LAYERS = 32
COSTS = ideal_costs()
# Memory limits, as shares of what a stage keeps of the longest sequence with nothing checkpointed.
LIMITS = (8.0, 2.0, 1.0, 0.8, 0.6, 0.4, 0.3)
SHORT_LIMITS = (8.0, 2.0, 1.0, 0.8, 0.5)
# (ranks, sequences, slices of the longest): about 300 and 750 chunks.
SIZES = ((4, 330, 32), (4, 1750, 16), (8, 330, 32), (8, 1750, 16))
SOLVER_LIMITS = (1.0, 0.5, 0.3)


def build_parser() -> ScriptParser:
    """There are no options; it refuses what is given all the same."""
    return ScriptParser(prog="benchmark_elastic", description=__doc__)


def main() -> None:
    """Print both tables."""
    build_parser().parse_args()
    _gains("skewed", skewed_lengths(), LIMITS)
    _gains("short-tailed", short_tailed_lengths(), SHORT_LIMITS)
    _solver()


def _job(lengths: tuple[int, ...], ranks: int, share: float) -> ElasticJob:
    kept = max(lengths) * COSTS.token_bytes * LAYERS / ranks
    return ElasticJob(costs=COSTS, num_stages=ranks, num_layers=LAYERS, memory_limit_bytes=int(share * kept))


def _gains(name: str, lengths: tuple[int, ...], limits: tuple[float, ...]) -> None:
    print(f"{name}: {len(lengths)} sequences, {sum(lengths)} tokens, longest {max(lengths)}, p = 4")
    print(
        f"{'limit':>6} {'chunks':>7} {'pipelines':>9} {'bubble':>7} {'recompute':>9} {'peak/limit':>10} "
        f"{'over packed':>11} {'over fixed':>10} {'over even':>9} {'plan s':>7}"
    )
    for share in limits:
        job = _job(lengths, 4, share)
        started = time.perf_counter()
        plan = plan_batch(lengths, job)
        seconds = time.perf_counter() - started
        own = plan.prediction
        ratios = [
            f"{b.prediction.time_ms / own.time_ms:.2f}x" if b.prediction else "no room"
            for b in predict_baselines(lengths, job)
        ]
        print(
            f"{share:6.1f} {len(plan.recipe.chunks):7} {len(plan.recipe.pipelines):9} {own.bubble:7.1%} "
            f"{own.recompute:9.1%} {max(own.peak_bytes) / job.memory_limit_bytes:10.3f} "
            f"{ratios[0]:>11} {ratios[1]:>10} {ratios[2]:>9} {seconds:7.2f}"
        )


def _solver() -> None:
    print(
        f"{'p':>2} {'limit':>6} {'chunks':>7} {'one pipeline s':>14} {'grouped s':>10} {'whole plan s':>12}"
    )
    for ranks, count, slices in SIZES:
        lengths = skewed_lengths(count)
        mesh = equal_time_mesh(max(lengths), slices, COSTS)
        chunks = order_chunks(make_chunks(lengths, mesh, COSTS, max(lengths)), COSTS)
        for share in SOLVER_LIMITS:
            job = _job(lengths, ranks, share)
            try:
                one = f"{solve(chunks, (len(chunks),), job)[1]:14.2f}"
            except ValueError:
                one = f"{'no room':>14}"
            sizes, _ = group_sequences(
                chunks,
                COSTS,
                stage_layers=job.layers_by_stage,
                limit_bytes=job.memory_limit_bytes,
            )
            _, grouped = solve(chunks, sizes, job)
            started = time.perf_counter()
            plan_batch(lengths, job)
            whole = time.perf_counter() - started
            print(f"{ranks:2} {share:6.1f} {len(chunks):7} {one} {grouped:10.2f} {whole:12.2f}", flush=True)


if __name__ == "__main__":
    main()
