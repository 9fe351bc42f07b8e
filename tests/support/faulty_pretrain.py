"""pretrain_gpt.py with a fault at an exact place: ``FAULT=KIND RANK STEP OPERATION``, like ``kill 1 3 B``.

The fault happens inside the first operation of that kind in that step on that rank. ``differ`` changes an
argument of the rank instead.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import pretrain_gpt
from helixpipe.reliability.monitor import Monitor
from helixpipe.reliability.record import SharedProgress
from helixpipe.runtime.header import HeaderCheck
from helixpipe.runtime.message import MessageLayout


def _raise() -> None:
    raise ArithmeticError("a layer failed")


def _run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def _hold_interpreter() -> None:
    """Lock a mutex twice: no signal ends this wait. A PyDLL's functions keep the interpreter's lock."""
    lock = ctypes.PyDLL(None).pthread_mutex_lock
    mutex = ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)


def _send_half() -> None:
    """From now on this rank believes that messages are half as long."""
    pack, write = MessageLayout.pack, HeaderCheck.write

    def half(layout: MessageLayout) -> MessageLayout:
        return MessageLayout((torch.Size((layout.num_elements // 2,)),), layout.dtype)

    def packed(self: MessageLayout, tensors: Any) -> Any:
        return pack(half(self), [torch.zeros(shape, dtype=self.dtype) for shape in half(self).shapes])

    def written(self: HeaderCheck, tag: int, layout: MessageLayout, buffer: Any) -> None:
        write(self, tag, half(layout), buffer)

    MessageLayout.pack = packed  # type: ignore[method-assign]
    HeaderCheck.write = written  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": _raise,
    "oom": _run_out_of_memory,
    "hold": _hold_interpreter,
    "sleep": lambda: time.sleep(1000),
    "half": _send_half,
}


def inject(kind: str, step: int, operation_kind: str) -> None:
    """Let the fault happen inside an operation."""
    begin, enter = SharedProgress.begin, Monitor.enter
    now = {"step": 0, "done": False}

    def entered(self: Monitor, phase: str, step: int | None = None) -> None:
        enter(self, phase, step)
        now["step"] = step or now["step"]

    def begun(self: SharedProgress, operation: Any) -> None:
        begin(self, operation)
        if now["step"] == step and operation.kind.value == operation_kind and not now["done"]:
            now["done"] = True
            os.write(2, f"FAULT {kind} in {operation} at {time.time():.3f}\n".encode())
            FAULTS[kind]()

    Monitor.enter = entered  # type: ignore[method-assign]
    SharedProgress.begin = begun  # type: ignore[method-assign]


if __name__ == "__main__":
    kind, rank, step, operation_kind = os.environ["FAULT"].split()
    if os.environ["RANK"] == rank:
        if kind == "differ":
            sys.argv += ["--seq-length", "64"]
        else:
            inject(kind, int(step), operation_kind)
    code = pretrain_gpt.main()
    if code:
        sys.stdout.flush()
        os._exit(code)
