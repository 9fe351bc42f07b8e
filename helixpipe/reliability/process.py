"""What one process can learn from another without its help."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

_STACK_BYTES = 1 << 20
# How long a process may take to write them, and without another line until it is believed to have ended.
_STACKS_S = 3.0
_QUIET_S = 0.3
_POLL_S = 0.05


def is_stopped(process: int) -> bool:
    """True if a signal or a debugger has stopped it; False where there is no /proc."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    # The name before the state may contain anything.
    return text.rpartition(")")[2].split()[0] in ("T", "t")


def force_stacks(process: int, descriptor: int) -> None:
    """Have a process whose interpreter hangs write its stacks.

    Not for one whose interpreter runs: frames that change meanwhile can end it.

    Args:
        process: has registered ``faulthandler`` for SIGUSR2.
        descriptor: of the file that it writes to.
    """
    os.kill(process, signal.SIGUSR2)
    size, changed = 0, time.monotonic()
    end = changed + _STACKS_S
    while time.monotonic() < (changed + _QUIET_S if size else end):
        time.sleep(_POLL_S)
        found = os.fstat(descriptor).st_size
        if found != size:
            size, changed = found, time.monotonic()


def keep_stacks(descriptor: int, path: Path) -> str:
    """Copy what a process has written to ``descriptor``; says where it is.

    Args:
        descriptor: of the file that it writes to.
        path: where to; what stands there stays, and the copy gets a number.
    """
    text = os.pread(descriptor, _STACK_BYTES, 0)
    if not text:
        return "its stacks could not be written"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return f"stacks in {_write_beside(path, text)}"
    except OSError as error:
        return f"its stacks could not be written to {path} ({error.strerror})"


def _write_beside(path: Path, text: bytes) -> Path:
    """Write a new file under this name, or with a number; says which."""
    place, count = path, 1
    while True:
        try:
            with place.open("xb") as stream:
                stream.write(text)
            return place
        except FileExistsError:
            count += 1
            place = path.with_stem(f"{path.stem}-{count}")
