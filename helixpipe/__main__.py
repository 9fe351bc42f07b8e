"""Command line: ``python -m helixpipe COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from helixpipe.commands import (
    batch_planning,
    conversion,
    lengths,
    measurement,
    planning,
    prediction,
    preflight,
    preparation,
    run_report,
    training,
)
from helixpipe.commands.parser import Parser, UsageError
from helixpipe.commands.terminal import run_printing
from helixpipe.reliability.exit_codes import BAD_USAGE, JobError

# What the base install leaves out.
_OF_TRAINING = ("torch", "megatron", "tokenizers", "psutil", "tqdm")
_OF_HUGGING_FACE = ("safetensors",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it succeeded, else its exit code, 2 for wrong input, with one line on stderr.

    Without a command it prints the help, as ``--help`` does. If nobody reads the output any more, it is 141.
    """
    return run_printing(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    program = "helixpipe"
    parser = build_parser()
    try:
        args, more = parser.parse_known_args(arguments)
        if args.command is None and not more:
            parser.print_help()
            return 0
        if more and not getattr(args, "takes_more", False):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        args.more = more
        program = f"helixpipe {args.command}"
        args.run(args)
    except UsageError as error:
        return _fail(error.program, error)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return _fail(program, error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OF_TRAINING + _OF_HUGGING_FACE:
            raise
        extra = "train" if package in _OF_TRAINING else "hf"
        return _fail(program, f"needs {error.name}; pip install 'helixpipe[{extra}]' brings it")
    return 0


def _fail(program: str, error: Exception | str) -> int:
    print(f"{program}: error: {error}", file=sys.stderr)
    return error.exit_code if isinstance(error, JobError) else BAD_USAGE


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = Parser(prog="helixpipe", description="Plan and look at pipeline schedules.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in (
        planning,
        prediction,
        measurement,
        run_report,
        lengths,
        batch_planning,
        preflight,
        preparation,
        training,
        conversion,
    ):
        module.add_parsers(commands.add_parser)
    return parser


def _version() -> str:
    try:
        return version("helixpipe")
    except PackageNotFoundError:  # a checkout on the path
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
