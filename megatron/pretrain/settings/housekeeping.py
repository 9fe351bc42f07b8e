"""When memory is collected and given back beside training."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from helixpipe.commands.ranges import Whole


@dataclass(frozen=True)
class HousekeepingSettings:
    """What to collect when.

    Attributes:
        is_manual: whether Python collects only when told to, so that all ranks do at the same time.
        interval: iterations between collections; 0 for none.
        around_evaluation: whether to collect young objects before and after an evaluation.
        emptying: how often to give unused GPU memory back in an iteration: 0, 1 or 2 times.
    """

    is_manual: bool
    interval: int
    around_evaluation: bool
    emptying: int


def add_housekeeping_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of arguments."""
    add = parser.add_argument_group("housekeeping").add_argument
    add("--manual-gc", action="store_true", help="collect garbage of Python on all ranks at the same time")
    add("--manual-gc-interval", type=Whole(least=0), default=0, metavar="N", help="iterations between")
    add(
        "--no-manual-gc-eval",
        "--disable-manual-gc-eval",
        action="store_false",
        dest="manual_gc_eval",
        help="do not collect around evaluations",
    )
    add(
        "--empty-unused-memory-level",
        type=Whole(least=0, most=2),
        default=0,
        help="give unused GPU memory back: 1 before the optimizer, 2 also after it (default 0: never)",
    )


def housekeeping_of(args: argparse.Namespace) -> HousekeepingSettings:
    """What this job does.

    Raises:
        ValueError: an interval or a switch that would be ignored.
    """
    if not args.manual_gc and (args.manual_gc_interval or not args.manual_gc_eval):
        flag = "--manual-gc-interval" if args.manual_gc_interval else "--no-manual-gc-eval"
        raise ValueError(f"{flag} needs --manual-gc")
    return HousekeepingSettings(
        args.manual_gc, args.manual_gc_interval, args.manual_gc_eval, args.empty_unused_memory_level
    )
