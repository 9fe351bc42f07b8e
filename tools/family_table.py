"""Print what tests/pretrain/test_model_families.py holds: how exact each family on Hugging Face is here.

    python tools/family_table.py --families llama-3.1 qwen-3 --ranks 2

Tiny random models: logits against transformers', losses and gradients under helix on several ranks against
Megatron's own model under 1F1B and against transformers', tensors of an export against those imported. Models
with experts have a row for two ranks of a stage that share these out, too.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

# From a checkout only: the tests' own functions measure.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.ranges import Whole

_HEAD = (
    "family", "logits", "p", "losses, Megatron", "gradients, Megatron", "losses, transformers",
    "gradients, transformers", "round trip",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser alone."""
    parser = ScriptParser(prog="family_table.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument(
        "--ranks", nargs="+", type=Whole(most=8), default=[2, 4], help="pipeline sizes (default 2 4)"
    )
    return parser


def main() -> None:
    """Print the table."""
    parser = build_parser()
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from families import TINY, changed_by_round_trip, errors_under_helix, import_tiny, logits_error

    unknown = sorted(set(args.families or ()) - TINY.keys())
    if unknown:
        parser.error(f"--families {unknown[0]} is not known; choose from {', '.join(TINY)}")
    print(f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|", sep="\n")
    for name in args.families or TINY:
        with tempfile.TemporaryDirectory() as folder:
            made = import_tiny(name, Path(folder))
            logits = f"{logits_error(made):.1e}"
            trip = ", ".join(changed_by_round_trip(made, Path(folder) / "export")) or "same bits"
            layouts = [(p, 1) for p in args.ranks]
            if "--num-experts" in made.words:
                layouts.append((min(args.ranks), 2))
            for p, ep in layouts:
                errors = errors_under_helix(made, p, ep)
                cells = [f"{value:.1e}" for of in ("megatron", "transformers") for value in errors[of]]
                ranks = f"{p}, ep {ep}" if ep > 1 else str(p)
                print(f"| {' | '.join((name, logits, ranks, *cells, trip))} |", flush=True)


if __name__ == "__main__":
    main()
