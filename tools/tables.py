"""Write the tables of docs/choosing.md anew: closed forms of the schedules, predicted efficiency.

    python tools/tables.py [--check]

Each table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.plan import Plan, ScheduleRequest  # noqa: E402
from helixpipe.plan.advise.advice import efficiency  # noqa: E402
from helixpipe.plan.cost_model import (  # noqa: E402
    HARDWARE,
    MODELS,
    Pieces,
    Recompute,
    Workload,
    costs_of_plan,
    predict_pieces,
)
from helixpipe.plan.formulas import markdown_table  # noqa: E402
from helixpipe.plan.schedules import SCHEDULES  # noqa: E402
from helixpipe.plan.simulation.memory import peak_bytes  # noqa: E402

MODEL, MACHINE = "gpt-7b", "h20"
P, TP, M = 8, 8, 16
LENGTHS = (32, 64, 96, 128)
LIMIT_GIB = HARDWARE[MACHINE].memory_gib - 4
# From what costs no time to what costs most.
_MARKS = {Recompute.NONE: "", Recompute.WITHOUT_ATTENTION: " *", Recompute.FULL: " †"}


class Row(NamedTuple):
    """A line of the table: a schedule with its options."""

    label: str
    schedule: str
    options: dict[str, int | str]
    chunked_loss: bool = False


ROWS = (
    Row("GPipe", "gpipe", {}),
    Row("1F1B", "1f1b", {}),
    Row("interleaved, one layer per stage", "interleaved", {"virtual_stages": 4}),
    Row("ZB-H1", "zb-h1", {}),
    Row("ZB-V", "zb-v", {}),
    Row("V-Half", "v-half", {}),
    Row("V-Min", "v-min", {}),
    Row("DualPipeV", "dualpipe-v", {}),
    Row("Seq1F1B, 4 slices", "seq1f1b", {"num_slices": 4}),
    Row("helix, one fold", "helix", {"num_fold": 1}),
    Row("**helix**, two folds", "helix", {}),
    Row("**helix**, two folds, chunked loss", "helix", {}, True),
    Row("**helix**, two folds, spread head", "helix", {"head_placement": "spread"}),
    Row("**helix**, two folds, `block` range", "helix", {"attention_range": "block"}),
    Row(
        "**helix**, two folds, `block` range, spread head",
        "helix",
        {"attention_range": "block", "head_placement": "spread"},
    ),
)


def efficiency_table() -> str:
    """Efficiency by schedule and sequence length, with the least recomputation that fits."""
    head = ["schedule", *(f"{k}k" for k in LENGTHS), f"{LENGTHS[-1]}k, all recompute *", "GiB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in ROWS:
        plan = _plan(row)
        cells = [_cell(row, plan, k * 1024) for k in LENGTHS]
        pieces = _pieces(row, LENGTHS[-1] * 1024)
        costs = costs_of_plan(pieces, plan, Recompute.WITHOUT_ATTENTION)
        held = max(peak_bytes(plan, costs)) / 2**30
        cells += [f"{efficiency(plan, costs):.2f}", f"{held:.0f}"]
        lines.append("| " + " | ".join([row.label, *cells]) + " |")
    return "\n".join(lines)


def _plan(row: Row) -> Plan:
    layers = MODELS[MODEL].num_layers
    request = ScheduleRequest(num_layers=layers, num_ranks=P, num_microbatches=M, **row.options)  # type: ignore[arg-type]
    return SCHEDULES[row.schedule].plan(request)


def _pieces(row: Row, seq_length: int) -> Pieces:
    workload = Workload(
        model=MODELS[MODEL], seq_length=seq_length, tensor_parallel=TP, whole_logits=not row.chunked_loss
    )
    return predict_pieces(workload, HARDWARE[MACHINE])


def _cell(row: Row, plan: Plan, seq_length: int) -> str:
    pieces = _pieces(row, seq_length)
    for recompute, mark in _MARKS.items():
        costs = costs_of_plan(pieces, plan, recompute)
        if max(peak_bytes(plan, costs)) <= LIMIT_GIB * 2**30:
            return f"{efficiency(plan, costs):.2f}{mark}"
    return "too large"


TABLES = {"schedules": markdown_table, "efficiency": efficiency_table}


def updated(text: str) -> str:
    """``text`` with every table made anew."""
    for name, make in TABLES.items():
        start, end = f"<!-- table: {name} -->", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found:
            raise ValueError(f"docs/choosing.md has no place for the table {name}; add {start} and {end}")
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n{make().rstrip()}\n{end}{after}"
    return text


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog="tables", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if the tables are old")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the page, or with ``--check`` only say whether it is up to date."""
    options = build_parser().parse_args(arguments)
    page = ROOT / "docs" / "choosing.md"
    old = page.read_text(encoding="utf-8")
    new = updated(old)
    if options.check:
        return int(old != new)
    page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
