"""Shows what training jobs report, one beside the other: the quickstart's voice.

    pretrain_gpt.py … --metrics-jsonl RUN/helix/metrics.jsonl | side_by_side.py follow RUN helix 1f1b
    side_by_side.py summary RUN 1f1b helix
    side_by_side.py typical RUN helix

In a terminal there is a live line while an iteration runs; a log gets plain lines.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Works from a checkout that is not installed, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helixpipe.commands.parser import ScriptParser
from helixpipe.report.run import read_run

# Both schedules add up the same numbers in another order, in fp32.
TOLERANCE = 1e-5


def build_parser() -> ScriptParser:
    """The parser alone."""
    commands = ("follow", "summary", "typical")
    parser = ScriptParser(prog="side_by_side", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=commands, metavar="{" + ",".join(commands) + "}")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder with one folder per schedule")
    parser.add_argument(
        "schedules", nargs="+", metavar="SCHEDULE", help="follow: the one that runs, and one to compare with"
    )
    return parser


def main() -> None:
    """Run one of the three commands."""
    args = build_parser().parse_args()
    console = Console(highlight=False)
    if args.command == "follow":
        follow(console, args.run, *args.schedules)
    elif args.command == "typical":
        typical(args.run, args.schedules)
    else:
        summary(console, args.run, args.schedules)


def records(run: Path, schedule: str) -> list[dict[str, Any]]:
    """What a job has reported so far, one object per iteration."""
    path = run / schedule / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def follow(console: Console, run: Path, schedule: str, other: str | None = None) -> None:
    """A line per iteration, as the job on standard input prints its own."""
    beside = [record["lm_loss"] for record in records(run, other)] if other else []
    shown = 0
    with console.status(f"{schedule}: starting") as status:
        # The job writes an iteration's metrics before it prints its line.
        for _ in sys.stdin:
            for record in records(run, schedule)[shown:]:
                shown += 1
                loss = record["lm_loss"]
                line = f"{schedule:6} iteration {shown:2}   loss {loss:.5f}"
                if shown <= len(beside):
                    line += f"   {other} {beside[shown - 1]:.5f}   {agreement(loss, beside[shown - 1])}"
                console.print(line)
                status.update(
                    f"{schedule}: iteration {shown + 1}, {record['tokens_per_second']:.0f} tokens/s"
                )


def agreement(loss: float, other: float) -> str:
    """Whether two losses are equal but for rounding."""
    difference = abs(loss - other) / other
    return f"agree to {difference:.0e}" if difference <= TOLERANCE else f"DIFFER by {difference:.0e}"


def summary(console: Console, run: Path, schedules: list[str]) -> None:
    """Speed, bubble and memory of each, without the first iteration, and the ratio of speeds."""
    table = Table("schedule", "loss", "tokens/s", "bubble", "peak memory of a rank")
    speeds = []
    for schedule in schedules:
        warm = records(run, schedule)[1:]
        if not warm:
            sys.exit(f"side_by_side: error: {run / schedule} reports fewer than two iterations")
        speeds.append(statistics.median(record["tokens_per_second"] for record in warm))
        bubble = statistics.median(record["bubble_ratio"] for record in warm)
        peak = max(max(record["peak_memory_bytes"]) for record in warm) / 2**30
        table.add_row(
            schedule, f"{warm[-1]['lm_loss']:.5f}", f"{speeds[-1]:.0f}", f"{bubble:.1%}", f"{peak:.2f} GiB"
        )
    console.print(table)
    console.print(
        f"{schedules[-1]} trains {speeds[-1] / speeds[0]:.2f} times as fast as {schedules[0]} here."
    )


def typical(run: Path, schedules: list[str]) -> None:
    """The timeline of the iteration of median time of each: what else a machine does hits single ones."""
    for schedule in schedules:
        found = read_run(run / schedule)
        print(found.timelines[found.sample()])


if __name__ == "__main__":
    main()
