"""Where a job ends before its last iteration, on purpose."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from helixpipe.commands.ranges import Real, Whole


@dataclass(frozen=True)
class Ending:
    """When to end.

    Attributes:
        interval: after an iteration that this divides; None for no such end.
        minutes: after the iteration in which the program has run so long; None for no such end.
    """

    interval: int | None
    minutes: float | None


def add_ending_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of arguments."""
    add = parser.add_argument_group("ending early").add_argument
    add("--exit-interval", type=Whole(), metavar="N", help="end, saved, after an iteration that N divides")
    add(
        "--exit-duration-in-mins",
        type=Real(above=0.0, most=1e7),
        metavar="M",
        help="end, saved, after the iteration in which the program has run for so many minutes",
    )


def ending_of(args: argparse.Namespace) -> Ending:
    """Where this job ends early."""
    return Ending(args.exit_interval, args.exit_duration_in_mins)
