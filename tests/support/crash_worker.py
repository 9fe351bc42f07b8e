"""Jobs that are killed at the n-th thing that they do to the file system, or compute."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import training_worker
from training_worker import Fault, run_cases

from megatron.pretrain import side_outputs
from megatron.pretrain.checkpoint import publishing, saver
from megatron.pretrain.checkpoint.shards import HashingFile

# Everything that saving, pruning and going back consist of goes through these.
_CHANGES = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "link")
# What a job is doing when it does one of these, by the innermost of its functions; else it starts or ends.
_DOING = {
    "saving": ((saver, "start_saving"), (HashingFile, "write")),
    "publishing": ((saver, "publish"),),
    "pruning": ((publishing, "_tidy"),),
    "going back": ((publishing, "_set_aside"), (side_outputs, "_set_aside_later_lines")),
}
TRAINING, STARTING = "training", "starting or ending"
PHASES = (TRAINING, STARTING, *_DOING)


class _Count:
    """What this process has done in the present run by phase, and after how much of which it is to die."""

    done: ClassVar[Counter[str]] = Counter()
    phase, last = "", -1
    here = threading.local()


class Killed(Fault):
    """SIGKILL at one of the things that the job does; without arguments they are counted only.

    Args:
        phase: one of ``PHASES``.
        last: how many things of this phase the job does before.
    """

    def __init__(self, phase: str = "", last: int = -1) -> None:
        self.phase, self.last = phase, last

    def on_step(self) -> None:
        _happens(TRAINING)

    def on_gradients(self, state: Any) -> None:
        _happens(TRAINING)


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
    """As :func:`run_cases` on one rank, with everything counted: ``done`` of an outcome, by phase."""
    for name in _CHANGES:
        setattr(os, name, _counted(getattr(os, name)))
    # What a run puts in the place of a fault's.
    training_worker.real_fsync = os.fsync
    HashingFile.write = _counted(HashingFile.write)  # type: ignore[method-assign]
    for phase, places in _DOING.items():
        for owner, name in places:
            setattr(owner, name, _within(phase, getattr(owner, name)))
    outcomes = []
    for line, fault in cases:
        _Count.done, _Count.phase, _Count.last = Counter(), fault.phase, fault.last
        (outcome,) = run_cases([(line, fault)], 1, 1, common) if not outcomes else _again(line, fault, common)
        outcomes.append(outcome | {"done": dict(_Count.done)})
    return outcomes


def _again(line: str, fault: Killed, common: str) -> list[dict[str, Any]]:
    """The groups are there already."""
    return [training_worker._run(f"{common} {line}".split(), fault)]


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        _happens(getattr(_Count.here, "phase", STARTING))
        return function(*arguments, **named)

    return call


def _within(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        outer = getattr(_Count.here, "phase", STARTING)
        _Count.here.phase = phase
        try:
            return function(*arguments, **named)
        finally:
            _Count.here.phase = outer

    return call


def _happens(phase: str) -> None:
    if (phase, _Count.done[phase]) == (_Count.phase, _Count.last):
        os.kill(os.getpid(), signal.SIGKILL)
    _Count.done[phase] += 1
