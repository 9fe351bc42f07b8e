"""Convert a model on Hugging Face to a checkpoint, and back.

    python tools/convert_hf.py import --input DIR --output CHECKPOINTS
    python tools/convert_hf.py export --input CHECKPOINTS --output DIR

The same as ``helixpipe convert``; see docs/models.md.
"""

from __future__ import annotations

import argparse
import os
import sys

# Works from a checkout that is not installed, too.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from helixpipe.commands.conversion import add_arguments, convert
from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.terminal import run_printing


def build_parser() -> argparse.ArgumentParser:
    """The parser alone."""
    parser = ScriptParser(prog="convert_hf.py", description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    return parser


def main() -> int:
    """Convert; 0, or 2 for wrong input, with one line on stderr."""
    parser = build_parser()
    args = parser.parse_args()
    try:
        convert(args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(run_printing(main))
