"""Command line: ``python -m helixpipe COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from helixpipe.commands import elastic, measurement, planning, prediction
from helixpipe.commands.parser import Parser, UsageError
from helixpipe.reliability.exit_codes import BAD_USAGE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it succeeded, 2 with one line on stderr if the input was wrong."""
    program = "helixpipe"
    try:
        args = _parser().parse_args(arguments)
        program = f"helixpipe {args.command}"
        args.run(args)
    except UsageError as error:
        return _fail(error.program, error)
    except (ValueError, OSError) as error:
        return _fail(program, error)
    return 0


def _fail(program: str, error: Exception) -> int:
    print(f"{program}: error: {error}", file=sys.stderr)
    return BAD_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="helixpipe", description="Plan and look at pipeline schedules.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (planning, prediction, measurement, elastic):
        module.add_parsers(commands.add_parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
