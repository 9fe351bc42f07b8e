"""How long the joint search takes, and what it finds: 64, 256 and 1024 GPUs.

    python benchmarks/search.py [--gpus 64 256 1024] [--model llama-7b] [--hardware h100]

Batches have as many sequences as there are GPUs. Seconds are those of the processor, so that other work on
the machine matters little.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.commands.ranges import RANKS, Whole  # noqa: E402
from helixpipe.plan.advise import search  # noqa: E402
from helixpipe.plan.cost_model import Workload, read_hardware, read_model  # noqa: E402
from helixpipe.report.advice import describe_seconds  # noqa: E402


def build_parser() -> ScriptParser:
    """Model, machine and numbers of GPUs."""
    parser = ScriptParser(prog="benchmark_search", description=__doc__)
    parser.add_argument("--gpus", type=RANKS, nargs="+", default=[64, 256, 1024], metavar="N")
    parser.add_argument("--model", default="llama-7b", help="as for advise")
    parser.add_argument("--hardware", default="h100", help="as for advise")
    parser.add_argument("--seq-length", type=Whole(), default=131072, help="tokens of a sequence")
    return parser


def main() -> None:
    """Print a row of a table for each number of GPUs."""
    args = build_parser().parse_args()
    machine = read_hardware(args.hardware)
    workload = Workload(model=read_model(args.model), seq_length=args.seq_length)
    print("| GPUs | layouts | candidates | simulated | best | iteration | MFU | above the bound | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for gpus in args.gpus:
        started = time.process_time()
        found = search(machine, workload, num_gpus=gpus, global_batch=gpus)
        seconds = time.process_time() - started
        row = [f"{gpus}", f"{found.num_layouts}", f"{found.num_candidates}", f"{found.num_simulated}"]
        if found.findings:
            best = found.findings[0]
            row += [
                f"{best.layout.label}, {best.option.candidate.label}",
                describe_seconds(best.iteration_ms),
                f"{best.option.mfu:.1%}",
                f"{best.iteration_ms / found.bound_ms - 1:.1%}",
            ]
        else:
            row += ["nothing fits", "", "", ""]
        print("| " + " | ".join([*row, f"{seconds:.1f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
