"""pretrain_gpt.py with a fault at an exact place: ``FAULT=KIND RANK STEP OPERATION``, like ``kill 1 3 B``.

The fault happens inside the first operation of that kind in that step on that rank; with a message as the
fifth word, like ``5RECV_B3@1``, as soon as another rank waits for it, of which the file ``FAULT_MARK`` tells.
``differ`` changes an argument of the rank instead; ``stall`` lets its storage stand still in the step's save.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import torch

import pretrain_gpt
from helixpipe.reliability.monitor import Monitor
from helixpipe.reliability.record import SharedProgress
from helixpipe.runtime.header import HeaderCheck, Message
from helixpipe.runtime.message import MessageLayout
from helixpipe.runtime.trace import Trace
from helixpipe.runtime.transfers import Mail


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
    send, cpu = Mail.send, torch.device("cpu")

    def sent(self: Mail, message: Message, number: int, tensors: Any) -> Any:
        layout = MessageLayout((torch.Size((message.layout.num_elements // 2,)),), message.layout.dtype)
        shorter = message._replace(layout=layout)
        believing = copy(self)
        believing.headers = HeaderCheck(int(self.headers._words[number][0]), [shorter], cpu)
        return send(
            believing, shorter, 0, [torch.zeros(shape, dtype=layout.dtype) for shape in layout.shapes]
        )

    Mail.send = sent  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": _raise,
    "oom": _run_out_of_memory,
    "hold": _hold_interpreter,
    "sleep": lambda: time.sleep(1000),
    "half": _send_half,
}


_now = {"step": 0}


def follow_steps() -> None:
    """Keep the number of the step in ``_now``."""
    enter = Monitor.enter

    def entered(self: Monitor, phase: str, step: int | None = None) -> None:
        enter(self, phase, step)
        _now["step"] = step or _now["step"]

    Monitor.enter = entered  # type: ignore[method-assign]


def mark(step: int, message: str) -> None:
    """Make the file when this rank waits for a message in a step."""
    wait = SharedProgress.wait

    def waiting(self: SharedProgress, operation: Any) -> None:
        wait(self, operation)
        if _now["step"] == step and str(operation) == message:
            Path(os.environ["FAULT_MARK"]).touch()

    SharedProgress.wait = waiting  # type: ignore[method-assign]


def inject(kind: str, step: int, operation_kind: str, message: str) -> None:
    """Let the fault happen inside an operation; memory runs out where something is computed."""
    owner: Any = Trace if kind == "oom" else SharedProgress
    begin, done = owner.begin, []

    def begun(self: Any, operation: Any) -> None:
        begin(self, operation)
        if _now["step"] == step and operation.kind.value == operation_kind and not done:
            done.append(operation)
            while message and not Path(os.environ["FAULT_MARK"]).exists():
                time.sleep(0.01)
            os.write(2, f"FAULT {kind} in {operation} at {time.time():.3f}\n".encode())
            FAULTS[kind]()

    owner.begin = begun


def stall(step: int) -> None:
    """Nothing that this rank writes of a step's checkpoint is ever on disk."""
    fsync = os.fsync

    def stalling(descriptor: int) -> None:
        if f"iter_{step:07d}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            time.sleep(1000)
        fsync(descriptor)

    os.fsync = stalling


if __name__ == "__main__":
    kind, rank, step, operation_kind, *rest = os.environ["FAULT"].split()
    message = "".join(rest)
    follow_steps()
    if os.environ["RANK"] != rank:
        mark(int(step), message)
    elif kind == "differ":
        sys.argv += ["--seq-length", "64"]
    elif kind == "stall":
        stall(int(step))
    else:
        inject(kind, int(step), operation_kind, message)
    code = pretrain_gpt.main()
    if code:
        sys.stdout.flush()
        os._exit(code)
