"""``prepare``: text to a dataset, which needs more than the base install."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

_PROGRAM = "helixpipe prepare"


def add_parsers(add: Callable[..., Any]) -> None:
    """Add the command's parser, which leaves all options to the program's own."""
    parser = add("prepare", help="turn text into a dataset for training", add_help=False)
    parser.set_defaults(run=_prepare, takes_more=True)


def _prepare(args: argparse.Namespace) -> None:
    from helixpipe.commands.prepare_program import main, stop_on_signals

    stop_on_signals()
    if code := main(args.more, _PROGRAM):
        raise SystemExit(code)
