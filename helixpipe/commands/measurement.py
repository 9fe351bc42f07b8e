"""``profile`` and ``compare``: measure on this machine, and hold predictions against what ran."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helixpipe.commands.planning import read_plan, read_text
from helixpipe.commands.ranges import RANKS, REPEATS, Whole
from helixpipe.plan.cost_model import Workload, read_model
from helixpipe.plan.simulation.costs import parse_costs
from helixpipe.plan.simulation.timeline import Timeline


def add_parsers(add: Callable[..., Any]) -> None:
    """Add the commands' parsers."""
    profile = add("profile", help="measure a layer's pieces here; under torchrun also the links")
    profile.add_argument("--model", required=True, help="name or file, as for advise")
    profile.add_argument(
        "--vocab-size", type=Whole(), metavar="N", help="words, for a file that does not say"
    )
    profile.add_argument("--seq-length", type=Whole(), required=True)
    profile.add_argument("--micro-batch-size", type=Whole(), default=1)
    profile.add_argument("--tensor-model-parallel-size", type=RANKS, default=1)
    profile.add_argument("--no-sequence-parallel", action="store_true")
    profile.add_argument("--fp32", action="store_true", help="instead of bf16")
    profile.add_argument("--repeats", type=REPEATS, default=5, help="rounds per piece")
    profile.add_argument("--output", type=Path, required=True, help="profile.json")
    profile.set_defaults(run=_profile)

    comparison = add("compare", help="hold a predicted timeline against measured ones")
    comparison.add_argument("--plan", type=Path, required=True, help="plan.json, as training wrote it")
    comparison.add_argument("--trace", type=Path, required=True, help="the folder of --trace-dir")
    comparison.add_argument(
        "--costs", type=Path, help="predicted costs.json (default: the measured means, messages free)"
    )
    comparison.set_defaults(run=_compare)


def _profile(args: argparse.Namespace) -> None:
    workload = Workload(
        model=read_model(args.model, args.vocab_size),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        tensor_parallel=args.tensor_model_parallel_size,
        sequence_parallel=not args.no_sequence_parallel,
        element_bytes=4 if args.fp32 else 2,
    )
    # megatron.core warns at import about every optional package that is not installed.
    warnings.filterwarnings("ignore", module="megatron.core")
    # torch and Megatron take seconds to import: only this command pays for them.
    from helixpipe.profiling import profile

    pieces = profile(workload, repeats=args.repeats)
    if os.environ.get("RANK", "0") == "0":
        args.output.write_text(pieces.to_json(), encoding="utf-8")
        print(f"{pieces.source}. Wrote {args.output}")


def _compare(args: argparse.Namespace) -> None:
    from helixpipe.report.comparison import compare
    from helixpipe.report.comparison_text import print_comparison

    plan = read_plan(args.plan)
    costs = parse_costs(read_text(args.costs), plan) if args.costs else None
    if not args.trace.is_dir():
        raise ValueError(f"{args.trace} is no folder; give the one of --trace-dir")
    paths = sorted(args.trace.glob("iteration_*.json"))
    if not paths:
        raise ValueError(f"{args.trace} holds no iteration_*.json; train with --trace-dir {args.trace}")
    # The first iteration warms caches and connections up.
    measured = [Timeline.from_json(read_text(path)) for path in paths[1:] or paths]
    print_comparison(compare(plan, measured, costs))
