"""Command line: ``python -m helixpipe COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from helixpipe.commands import elastic, lengths, measurement, planning, prediction

EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it succeeded, 2 with one line on stderr if the input was wrong."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"helixpipe {args.command}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="helixpipe", description="Plan and look at pipeline schedules.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (planning, prediction, measurement, lengths, elastic):
        module.add_parsers(commands.add_parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
