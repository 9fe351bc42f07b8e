"""Look at a checkpoint, ours or one that Megatron-LM has saved as torch_dist.

    python tools/checkpoint.py info runs/quickstart/checkpoints
    python tools/checkpoint.py verify runs/quickstart/checkpoints/iter_0000010

prints one line per fact, and one line per fault of its files. No process group and no GPU is needed, and no
code of a checkpoint is run.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Works from a checkout that is not installed, too.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.terminal import run_printing
from helixpipe.reliability.exit_codes import BAD_DATA, DataError
from megatron.pretrain.checkpoint.inspection import facts, faults, find_checkpoint

_PROGRAM = "checkpoint"


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog=_PROGRAM, description="Look at a checkpoint.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,verify}")
    for name, what in (("info", "print one line per fact"), ("verify", "print one line per fault")):
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        command.add_argument(
            "folder", type=Path, metavar="DIR", help="of --save, whose latest is taken, or iter_… in it"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 2 for wrong input, 3 for a checkpoint with faults."""
    options = build_parser().parse_args(argv)
    try:
        folder = find_checkpoint(options.folder)
        if options.command == "info":
            for name, value in facts(folder):
                print(f"{name}: {value}")
            return 0
        found = faults(folder)
    except DataError as error:
        found = [str(error)]
    for line in found:
        print(f"{_PROGRAM}: error: {line}", file=sys.stderr)
    if not found:
        print(f"{folder} is whole")
    return BAD_DATA if found else 0


if __name__ == "__main__":
    sys.exit(run_printing(main))
