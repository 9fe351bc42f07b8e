"""``report``: a training run on one page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helixpipe.commands.ranges import Whole


def add_parsers(add: Callable[..., Any]) -> None:
    """Add the command's parser."""
    report = add("report", help="show a training run on one page: loss, speed, memory, ranks, schedule")
    report.add_argument(
        "folder",
        type=Path,
        metavar="RUN_DIR",
        help="that holds what --trace-dir and --metrics-jsonl have written",
    )
    report.add_argument("--output", type=Path, metavar="FILE", help="default: RUN_DIR/report.html")
    report.add_argument(
        "--iteration", type=Whole(), metavar="N", help="whose schedule is shown (default: of median time)"
    )
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    # Drawing takes a moment to import.
    from helixpipe.report.run import read_run
    from helixpipe.report.run_page import write_run_page

    run = read_run(args.folder)
    output = args.output or args.folder / "report.html"
    iteration = run.sample() if args.iteration is None else args.iteration
    write_run_page(run, output, title=f"Run {args.folder.resolve().name}", iteration=iteration)
    print(output)
