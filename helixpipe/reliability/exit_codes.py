"""Exit codes of a training job, and the errors that lead to them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

BAD_USAGE = 2  # arguments: correct the command
BAD_DATA = 3  # a file: the data set or a checkpoint
PEER_LOST = 4  # another rank is gone: its own message says why, or that it was killed
HANG = 5  # a rank did not answer within the deadline
BAD_NUMERICS = 6  # a loss or gradient that is not finite, or ranks whose numbers differ
OUT_OF_MEMORY = 7  # of a device
BAD_HOST = 8  # a machine that should not run this job: preflight says which
PREEMPTED = 75  # saved on request of the scheduler: start the same command again (EX_TEMPFAIL)
INTERRUPTED = 130  # saved on Ctrl-C: whoever pressed it does not want it started again by itself


class JobError(ValueError):
    """An end of the job with a message for its user and an exit code; any other ``ValueError`` is 2."""

    exit_code = BAD_USAGE


class DataError(JobError):
    """A file that is missing, damaged or does not fit the job."""

    exit_code = BAD_DATA


class NumericsError(JobError):
    """Numbers that training must not go on with."""

    exit_code = BAD_NUMERICS


def exit_code_of(error: BaseException) -> int:
    """The exit code of an error that the user can do something about."""
    if isinstance(error, JobError):
        return error.exit_code
    return BAD_DATA if isinstance(error, OSError) else BAD_USAGE


def leave_exit_code(code: int) -> None:
    """Leave this rank's exit code for its launcher: torchrun ends with 1 whatever its ranks end with.

    It becomes the file ``rank_RANK`` in the folder that ``HELIXPIPE_EXIT_CODES`` names, if it names one.
    """
    folder = os.environ.get("HELIXPIPE_EXIT_CODES")
    if folder:
        # The process ends: nobody is left to whom an error would matter more than its own.
        with contextlib.suppress(OSError):
            Path(folder, f"rank_{os.environ.get('RANK', '0')}").write_text(str(code), encoding="ascii")
