"""Write the tables of docs/ anew: closed forms of the schedules, predicted efficiency.

    python tools/tables.py [--check]

Each table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import anchors  # noqa: E402
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
from helixpipe.plan.schedules.request import KnownCosts  # noqa: E402
from helixpipe.plan.simulation.costs import Costs  # noqa: E402
from helixpipe.plan.simulation.memory import peak_bytes  # noqa: E402

MODEL, MACHINE = "gpt-7b", "h20"
P, TP, M = 8, 8, 16
ROUNDS = (16, 32)
LENGTHS = (32, 64, 96, 128)
LIMIT_GIB = HARDWARE[MACHINE].memory_gib - 4
# From what costs no time to what costs most.
_MARKS = {
    Recompute.NONE: "",
    Recompute.PRODUCTS: " ‡",
    Recompute.WITHOUT_ATTENTION: " *",
    Recompute.FULL: " †",
}
_INTERLOCKED: dict[str, int | str] = {
    "num_fold": 1,
    "attention_range": "block",
    "head_placement": "spread",
    "round_order": "interlocked",
}


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
    Row("**helix**, interlocked, `block` range, spread head", "helix", _INTERLOCKED),
    Row("the same with W", "helix", {**_INTERLOCKED, "split_weight_gradients": True}),
)
FILO = ROWS[-3]


def efficiency_table() -> str:
    """Efficiency by schedule and sequence length, with the least recomputation that fits."""
    head = ["schedule", *(f"{k}k" for k in LENGTHS), f"{LENGTHS[-1]}k, all recompute *", "GiB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in ROWS:
        cells = [_cell(row, k * 1024) for k in LENGTHS]
        plan, costs = _planned(row, LENGTHS[-1] * 1024, Recompute.WITHOUT_ATTENTION)
        cells += [f"{efficiency(plan, costs):.2f}", f"{_peak_gib(plan, costs):.0f}"]
        lines.append("| " + " | ".join([row.label, *cells]) + " |")
    return "\n".join(lines)


def interlocked_table() -> str:
    """Efficiency and peak of interlocked rounds at 128k, beside rounds one after the other."""
    head = ["128k, `block`, spread head", *(f"m = {m}" for m in ROUNDS), "GiB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    cases = [(FILO, Recompute.WITHOUT_ATTENTION, "FILO, two folds, all but attention recomputed")]
    for row, label in zip(ROWS[-2:], ("interlocked", "interlocked with W"), strict=True):
        cases += [
            (row, Recompute.NONE, f"{label}, nothing recomputed"),
            (row, Recompute.PRODUCTS, f"{label}, products kept"),
        ]
    for row, recompute, label in cases:
        found = [_planned(row, LENGTHS[-1] * 1024, recompute, m) for m in ROUNDS]
        cells = [f"{efficiency(plan, costs):.3f}" for plan, costs in found]
        cells.append(f"{max(_peak_gib(plan, costs) for plan, costs in found):.0f}")
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


def _planned(
    row: Row, seq_length: int, recompute: Recompute, m: int = M, *, fits_order: bool = True
) -> tuple[Plan, Costs]:
    """A row's plan and its costs; the order of interlocked rounds is fitted to them."""
    pieces = _pieces(row, seq_length)
    known = KnownCosts(lambda plan: costs_of_plan(pieces, plan, recompute))
    request = ScheduleRequest(
        num_layers=MODELS[MODEL].num_layers,
        num_ranks=P,
        num_microbatches=m,
        costs=known if fits_order and "round_order" in row.options else None,
        **row.options,  # type: ignore[arg-type]
    )
    plan = SCHEDULES[row.schedule].plan(request)
    return plan, known.of(plan)


def _peak_gib(plan: Plan, costs: Costs) -> float:
    return max(peak_bytes(plan, costs)) / 2**30


def _pieces(row: Row, seq_length: int) -> Pieces:
    workload = Workload(
        model=MODELS[MODEL], seq_length=seq_length, tensor_parallel=TP, whole_logits=not row.chunked_loss
    )
    # Every schedule with the same kernels: what attention loses on short slices is not work of an ideal.
    return replace(predict_pieces(workload, HARDWARE[MACHINE]), multiprocessors=0)


def _cell(row: Row, seq_length: int) -> str:
    for recompute, mark in _MARKS.items():
        if _peak_gib(*_planned(row, seq_length, recompute, fits_order=False)) <= LIMIT_GIB:
            return f"{efficiency(*_planned(row, seq_length, recompute)):.2f}{mark}"
    return "too large"


def published_table() -> str:
    """Predictions beside published throughput."""
    return anchors.table(anchors.read_rows())


def kernels_table() -> str:
    """The rows whose publication does not say which attention kernel ran, under either."""
    rows = [row for row in anchors.read_rows() if row["id"].startswith("nemo-7b")]
    return anchors.kernels_table(rows, ("flash-attn-2", "cudnn"))


def balance_table() -> str:
    """The rows whose publication does not say how ranks share a sequence, under either way."""
    rows = [row for row in anchors.read_rows() if row["id"].startswith("titan") and row.get("cp", 1) > 1]
    return anchors.balance_table(rows)


TABLES = {
    "choosing": {"schedules": markdown_table, "efficiency": efficiency_table},
    "interlocked": {"interlocked": interlocked_table},
    "published": {"published": published_table, "kernels": kernels_table, "balance": balance_table},
}


def updated(text: str, page: str) -> str:
    """``text`` with every table of a page made anew."""
    for name, make in TABLES[page].items():
        start, end = f"<!-- table: {name} -->", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found:
            raise ValueError(f"docs/{page}.md has no place for the table {name}; add {start} and {end}")
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n{make().rstrip()}\n{end}{after}"
    return text


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog="tables", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if the tables are old")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the pages, or with ``--check`` only say whether they are up to date."""
    options = build_parser().parse_args(arguments)
    is_old = False
    for page in TABLES:
        path = ROOT / "docs" / f"{page}.md"
        old = path.read_text(encoding="utf-8")
        new = updated(old, page)
        is_old |= old != new
        if not options.check:
            path.write_text(new, encoding="utf-8")
    return int(is_old and options.check)


if __name__ == "__main__":
    sys.exit(main())
