"""Jobs that are killed at the n-th thing that they do to the file system, or compute."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import training_worker
from training_worker import Fault, run_cases

from megatron.pretrain.checkpoint.shards import HashingFile

# Everything that saving, pruning and going back consist of goes through these.
_CHANGES = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "link", "write")


class _Count:
    """What this process has done in the present run, and after how much it is to die."""

    done = 0
    last = -1


class Killed(Fault):
    """SIGKILL at one of the things that the job does; it counts them, if ``last`` is negative."""

    def __init__(self, last: int = -1) -> None:
        self.last = last

    def on_step(self) -> None:
        _happens()

    def on_gradients(self, state: Any) -> None:
        _happens()
        self.seen.append(_Count.done)


class Waiting(Fault):
    """Stands in iteration 2 until a file is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step(self) -> None:
        if self.iteration == 2:
            (self.folder / "waiting").touch()
            while not (self.folder / "go on").exists():
                time.sleep(0.02)


def run_counted(cases: list[tuple[str, Killed]], common: str) -> list[dict[str, Any]]:
    """As :func:`run_cases` on one rank, with everything counted."""
    for name in _CHANGES:
        if name != "write":
            setattr(os, name, _counted(getattr(os, name)))
    # What a run puts in the place of a fault's.
    training_worker.real_fsync = os.fsync
    HashingFile.write = _counted(HashingFile.write)  # type: ignore[method-assign]
    outcomes = []
    for line, fault in cases:
        _Count.done, _Count.last = 0, fault.last
        (outcome,) = run_cases([(line, fault)], 1, 1, common) if not outcomes else _again(line, fault, common)
        outcomes.append(outcome | {"done": _Count.done})
    return outcomes


def _again(line: str, fault: Killed, common: str) -> list[dict[str, Any]]:
    """The groups are there already."""
    return [training_worker._run(f"{common} {line}".split(), fault)]


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        _happens()
        return function(*arguments, **named)

    return call


def _happens() -> None:
    if _Count.done == _Count.last:
        os.kill(os.getpid(), signal.SIGKILL)
    _Count.done += 1
