"""What one process can learn from another without its help."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

_STACK_BYTES = 1 << 20
_STACKS_S = 1.0
_POLL_S = 0.05


def is_stopped(process: int) -> bool:
    """True if a signal or a debugger has stopped it; False where there is no /proc."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    # The name before the state may contain anything.
    return text.rpartition(")")[2].split()[0] in ("T", "t")


def write_stacks(process: int, descriptor: int, path: Path) -> str:
    """Have a process write its stacks, whatever it is doing; says where they are.

    Args:
        process: has registered ``faulthandler`` for SIGUSR2. If it is stopped it goes on.
        descriptor: of the file that it writes to.
        path: where they are kept.
    """
    # Delivered in this order when it is stopped: it writes before it goes on.
    os.kill(process, signal.SIGUSR2)
    os.kill(process, signal.SIGCONT)
    text, end = b"", time.monotonic() + _STACKS_S
    while time.monotonic() < end:
        time.sleep(_POLL_S)
        found = os.pread(descriptor, _STACK_BYTES, 0)
        if found and found == text:
            break
        text = found
    if not text:
        return "its stacks could not be written"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    except OSError as error:
        return f"its stacks could not be written to {path} ({error.strerror})"
    return f"stacks in {path}"
