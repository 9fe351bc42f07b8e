"""Run a Megatron-LM script under a schedule of ours: ``python -m helixpipe.megatron_lm SCRIPT …``."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from helixpipe.megatron_lm.switch import switch_on
from helixpipe.reliability.exit_codes import BAD_USAGE, exit_code_of, leave_exit_code

if TYPE_CHECKING:
    from helixpipe.megatron_lm.step import Step

PROGRAM = "helixpipe.megatron_lm"
PACKAGE = Path(__file__).parents[1]


def main() -> int:
    """Run the script that the command line names; the exit code of an error of ours, after one line."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.stderr.write(f"usage: python -m {PROGRAM} SCRIPT [its arguments] --pipeline-schedule NAME\n")
        return BAD_USAGE
    del sys.argv[0]
    script = sys.argv[0]
    if not Path(script).is_file():
        return _fail(ValueError(f"{script} is not a file; give the path of a training script"))
    # As Python does for a script: what lies beside it can be imported.
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        step = switch_on(is_watched=True)
        with nullcontext() if step is None else _watched(step):
            runpy.run_path(script, run_name="__main__")
    except ValueError as error:
        if not _is_ours(error.__traceback__):
            raise
        return _fail(error)
    return 0


def _watched(step: Step) -> AbstractContextManager[None]:
    # Not before a schedule is asked for: this imports torch.
    from helixpipe.megatron_lm.watch import watched

    return watched(step, PROGRAM)


def _is_ours(frames: TracebackType | None) -> bool:
    """True if an error was raised in this package, and not in the script or in Megatron."""
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(frames)]
    return bool(files) and PACKAGE in files[-1].parents


def _fail(error: Exception) -> int:
    # In one write, newline included: ranks share the terminal.
    sys.stderr.write(f"{PROGRAM}: rank {os.environ.get('RANK', '0')}: error: {error}\n")
    code = exit_code_of(error)
    leave_exit_code(code)
    return code


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_code:
        # Not through the destructors of a process group whose other ranks are gone: they may wait for them.
        os._exit(exit_code)
