"""Turn text files, JSONL files or directories of them into a Megatron dataset.

    python tools/prepare_data.py --input src/ --pattern '*.py' --output-prefix data/src

The same as ``helixpipe prepare``; see docs/data.md.
"""

import os
import sys

# Works from a checkout that is not installed, too.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from helixpipe.commands.prepare_program import build_parser, main, stop_on_signals
from helixpipe.commands.terminal import run_printing

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    stop_on_signals()
    sys.exit(run_printing(main))
