"""Elastic helix against elastic 1F1B and packing, simulated on three skewed batches of 2.1 million tokens.

    python benchmarks/elastic_helix.py

Efficiency is the time of an ideal without bubble, recomputation and messages over the predicted time. Where
fewer layers beside the head shorten the slowest stage, 1F1B has them in a row of its own. The row with a
balanced head is a bound: 1F1B whose stages share the head's time evenly, at no cost.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.commands.ranges import GIBIBYTES, RANKS, Whole  # noqa: E402
from helixpipe.elastic import ChunkCosts, ElasticJob, ElasticPlan, plan_batch, predict_chunk_costs  # noqa: E402
from helixpipe.elastic.baselines import packed_plan  # noqa: E402
from helixpipe.elastic.sample import skewed_lengths  # noqa: E402
from helixpipe.elastic.search.choice import SLICE_COUNTS, Choice  # noqa: E402
from helixpipe.elastic.search.round_planner import plan_rounds  # noqa: E402
from helixpipe.elastic.search.stage_balance import balanced_stage_layers  # noqa: E402
from helixpipe.plan.cost_model import HARDWARE, MODELS, Workload  # noqa: E402
from helixpipe.plan.schedules.request import ATTENTION_RANGES  # noqa: E402
from helixpipe.plan.stage_layers import spell_stage_layers  # noqa: E402

TOKENS = 2_100_000
# Median, what one in a hundred exceeds, and the longest.
BATCHES = {
    "median 2k": (2000, 16000, 32768),
    "median 7k": (7000, 50000, 131072),
    "median 6k, one of 512k": (6000, 60000, 524288),
}
_GIB = 2**30


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog="benchmark_elastic_helix", description="Elastic helix against elastic 1F1B.")
    parser.add_argument("--model", choices=MODELS, default="llama-7b")
    parser.add_argument("--num-query-groups", type=Whole(), default=8, help="heads of keys and values")
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=[*BATCHES], help="default: all")
    parser.add_argument("--hardware", choices=HARDWARE, default="h20")
    parser.add_argument("--tensor-parallel", type=RANKS, default=8)
    parser.add_argument("--ranks", type=RANKS, default=8)
    parser.add_argument("--memory-limit-gib", type=GIBIBYTES, default=91.0)
    parser.add_argument("--attention-range", choices=ATTENTION_RANGES, default="core")
    return parser


def main() -> int:
    """Print a table for each batch; 2 with one line on stderr if the sizes do not fit together."""
    options = build_parser().parse_args()
    try:
        job = _job(options)
        print(
            f"{options.model} with {options.num_query_groups} heads of keys on {options.hardware}, tensor "
            f"{options.tensor_parallel} x pipeline {options.ranks}, {options.memory_limit_gib:g} GiB"
        )
        for name in options.batches:
            _compare(name, batch(*BATCHES[name]), job)
    except ValueError as error:
        print(f"benchmark_elastic_helix: error: {error}", file=sys.stderr)
        return 2
    return 0


def batch(median: int, long: int, longest: int) -> tuple[int, ...]:
    """As many sequences as come nearest to all tokens from below."""
    count = 1
    while sum(skewed_lengths(count + 1, median=median, long=long, longest=longest)) <= TOKENS:
        count += 1
    return skewed_lengths(count, median=median, long=long, longest=longest)


def _job(options: argparse.Namespace) -> ElasticJob:
    model = replace(MODELS[options.model], num_kv_heads=options.num_query_groups)
    workload = Workload(model=model, seq_length=8192, tensor_parallel=options.tensor_parallel)
    return ElasticJob(
        costs=predict_chunk_costs(workload, HARDWARE[options.hardware], options.ranks),
        num_stages=options.ranks,
        num_layers=model.num_layers,
        memory_limit_bytes=int(options.memory_limit_gib * _GIB),
        attention_range=options.attention_range,
    )


def _compare(name: str, lengths: Sequence[int], job: ElasticJob) -> None:
    print(f"\n{name}: {len(lengths)} sequences, {sum(lengths)} tokens, longest {max(lengths)}")
    print(
        f"{'schedule':34} {'chunks':>6} {'ms':>8} {'efficiency':>10} {'bubble':>7} {'recompute':>9} "
        f"{'GiB':>6} {'plan s':>7}"
    )
    ideal_ms = _ideal_ms(lengths, job)
    balanced = replace(job, costs=_with_balanced_head(job.costs, job.num_layers))
    uneven = balanced_stage_layers(lengths, job.costs, job.num_layers, job.num_stages)
    planners: dict[str, Callable[[], ElasticPlan]] = {
        "packed to the longest, 1F1B": partial(packed_plan, lengths, job),
        "elastic 1F1B, up to 64": partial(plan_batch, lengths, job, slice_counts=SLICE_COUNTS),
    }
    if uneven:
        own = replace(job, stage_layers=uneven)
        label = f"the same, {spell_stage_layers(uneven)} layers"
        planners[label] = partial(plan_batch, lengths, own, slice_counts=SLICE_COUNTS)
    planners |= {
        "the same, head balanced (bound)": partial(plan_batch, lengths, balanced, slice_counts=SLICE_COUNTS),
        "elastic helix": partial(plan_rounds, lengths, job),
    }
    plans: dict[str, ElasticPlan] = {}
    for label, planner in planners.items():
        started = time.perf_counter()
        try:
            plan = plans[label] = planner()
        except ValueError as error:
            print(f"{label:34} {str(error)[:120]}", flush=True)
            continue
        own = plan.prediction
        print(
            f"{label:34} {len(plan.recipe.chunks):6} {own.time_ms:8.0f} {ideal_ms / own.time_ms:10.3f} "
            f"{own.bubble:7.1%} {own.recompute:9.1%} {max(own.peak_with_messages) / _GIB:6.1f} "
            f"{time.perf_counter() - started:7.2f}",
            flush=True,
        )
    rivals = [plans[label] for label in ("elastic helix", "elastic 1F1B, up to 64") if label in plans]
    if len(rivals) == 2:
        best, other = sorted(rivals, key=lambda plan: plan.prediction.time_ms)
        print(f"choice: {Choice(best, {other.plan.schedule: other}).reason}")


def _ideal_ms(lengths: Sequence[int], job: ElasticJob) -> float:
    """All work shared out evenly, with nothing fixed per chunk."""
    total = 0.0
    for time_of in (job.costs.forward, job.costs.backward):
        tensor_parallel = job.costs.tensor_parallel
        layer = sum(time_of.attention_ms * n * n + time_of.token_ms * n for n in lengths) / tensor_parallel
        layer += time_of.communication_ms * sum(lengths)
        total += job.num_layers * layer + time_of.head_ms * sum(lengths) / tensor_parallel
    return total / job.num_stages


def _with_balanced_head(costs: ChunkCosts, num_layers: int) -> ChunkCosts:
    """The head's time shared out over all layers, and so over all stages."""
    forward, backward = (
        replace(t, head_ms=0.0, token_ms=t.token_ms + t.head_ms / num_layers)
        for t in (costs.forward, costs.backward)
    )
    return replace(costs, forward=forward, backward=backward)


if __name__ == "__main__":
    sys.exit(main())
