"""Do two checkouts train alike? For whoever moves code: losses to the bit, plans, and options.

Twelve short jobs of two ranks run from each checkout, on the same tokens. What differs is printed, and makes
the exit code 1.

    python tools/compare_checkouts.py ../before .
"""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

# Works from a checkout that is not installed, too.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from helixpipe.commands.parser import ScriptParser

MODEL = """
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --micro-batch-size 1
    --global-batch-size 4 --train-iters 4 --lr 3e-3 --lr-decay-iters 4 --min-lr 3e-4
    --attention-dropout 0 --hidden-dropout 0 --eval-iters 1 --eval-interval 2 --split 60,20,20
""".split()
LLAMA = """
    --swiglu --normalization RMSNorm --position-embedding-type rope --group-query-attention
    --num-query-groups 2 --disable-bias-linear --untie-embeddings-and-output-weights
"""
HELIX = "--pipeline-schedule helix --pipeline-model-parallel-size 2"
RUNS = {
    "one rank": "",
    "1f1b": "--pipeline-model-parallel-size 2",
    "interleaved": "--pipeline-schedule interleaved --pipeline-model-parallel-size 2 "
    "--num-layers-per-virtual-pipeline-stage 1",
    "zb-h1": "--pipeline-schedule zb-h1 --pipeline-model-parallel-size 2",
    "zb-v": f"--pipeline-schedule zb-v --pipeline-model-parallel-size 2 {LLAMA}",
    "gpipe": "--pipeline-schedule gpipe --pipeline-model-parallel-size 2",
    "helix": HELIX,
    "helix, one-fold": f"{HELIX} --num-fold 1",
    "helix, core range": f"{HELIX} --attention-range core {LLAMA}",
    "helix, block range, spread head": f"{HELIX} --attention-range block --head-placement spread {LLAMA}",
    "helix, recomputation": f"{HELIX} --recompute-without-attention {LLAMA}",
    "elastic": "--pipeline-schedule elastic --pipeline-model-parallel-size 2 --max-seq-length 1024 "
    "--max-position-embeddings 1024 --memory-limit-gib 40 --elastic-costs COSTS",
}
SAME_PLAN = "the same plan"


class Outcome(NamedTuple):
    """What a job has left behind; ``failed`` is the first line of an error, if it did not end well."""

    losses: list[tuple[float, float]]
    plan: Any
    failed: str


def run(checkout: Path, shared: Path, arguments: str) -> Outcome:
    """Train from a checkout, on the files that both use."""
    arguments = arguments.replace("COSTS", str(shared / "costs.json"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = "2" if "--pipeline-model-parallel-size" in arguments else "1"
        finished = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks),
                *("pretrain_gpt.py", *MODEL, *arguments.split(), "--data-path", str(shared / "corpus")),
                *("--metrics-jsonl", str(folder / "metrics.jsonl"), "--trace-dir", str(folder / "trace")),
            ],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode:
            errors = [line for line in finished.stderr.splitlines() if "rror" in line]
            return Outcome([], None, errors[0] if errors else f"exit code {finished.returncode}")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        plan = folder / "trace/plan.json"
        return Outcome(
            [(row["lm_loss"], row["grad_norm"]) for row in rows],
            json.loads(plan.read_text()) if plan.exists() else None,
            "",
        )


def options(checkout: Path) -> set[str]:
    """The options that a checkout's program knows."""
    shown = subprocess.run(
        [sys.executable, "pretrain_gpt.py", "--help"],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(re.findall(r"^ {2,}(?:-\w, )?(--[a-z0-9-]+)", shown, flags=re.MULTILINE))


def compare_plans(before: Any, after: Any) -> str:
    """In words, for plans as their files say them; None where Megatron's functions decided the order."""
    if before == after:
        return SAME_PLAN
    if before is None or after is None:
        return "a plan's file from one of them only"
    if _computing(before) != _computing(after):
        return "another order"
    return "the same order, with receives posted elsewhere"


def _computing(plan: Any) -> list[list[str]]:
    """What every rank computes and sends, in its order."""
    return [[operation for operation in order if "RECV" not in operation] for order in plan["orders"]]


def verdict(before: Outcome, after: Outcome) -> str:
    """In words: what differs, or that nothing does."""
    if before.failed or after.failed:
        return f"FAILED: {before.failed or 'before: well'} | {after.failed or 'after: well'}"
    if len(before.losses) != len(after.losses):
        return f"{len(before.losses)} and {len(after.losses)} iterations"
    if before.losses != after.losses:
        largest = max(
            abs(new - old) / (abs(old) or 1.0)
            for pair in zip(before.losses, after.losses, strict=True)
            for old, new in zip(*pair, strict=True)
        )
        return f"losses or norms differ, by up to {largest:.1e}"
    return f"losses to the bit, {compare_plans(before.plan, after.plan)}"


def prepare(checkout: Path, shared: Path) -> None:
    """Tokens of Python's own sources, and costs of elastic chunks, for both."""
    sources = [str(Path(module.__file__).parent) for module in (json, email)]
    for command in (
        [
            *("tools/prepare_data.py", "--input", *sources, "--pattern", "*.py", "--vocab-size", "300"),
            *("--output-prefix", str(shared / "corpus")),
        ],
        [
            *("-m", "helixpipe", "elastic-costs", "--model", "llama-7b", "--hardware", "a800"),
            *("--pipeline-model-parallel-size", "2", "--output", str(shared / "costs.json")),
        ],
    ):
        subprocess.run(
            [sys.executable, *command],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdout=subprocess.DEVNULL,
            check=True,
        )


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog="compare_checkouts", description="Do two checkouts train alike?")
    parser.add_argument("before", type=Path, metavar="before")
    parser.add_argument("after", type=Path, metavar="after")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    return parser


def main() -> int:
    """Compare and print; the exit code."""
    args = build_parser().parse_args()
    checkouts = [args.before.resolve(), args.after.resolve()]
    differs = False
    with tempfile.TemporaryDirectory() as name:
        prepare(checkouts[0], shared := Path(name))
        for run_name in args.runs:
            found = verdict(*(run(checkout, shared, RUNS[run_name]) for checkout in checkouts))
            differs |= not found.endswith(SAME_PLAN)
            print(f"{run_name:<34} {found}", flush=True)
    gone = options(checkouts[0]) - options(checkouts[1])
    print(f"options that are gone: {' '.join(sorted(gone)) or 'none'}")
    return int(differs or bool(gone))


if __name__ == "__main__":
    sys.exit(main())
