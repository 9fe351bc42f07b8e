"""A process that measures one configuration, and the parent's end of it.

What one configuration leaves in the allocator must not change the next one's figures, so each has a process
of its own. On a GPU the next one starts while the present one measures, imports everything, and waits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

RAN_OUT = "out of memory"


class Workers:
    """Runs tasks one after the other, each in a fresh process.

    Args:
        command: starts a process that calls :func:`serve`.
        environment: variables to change for it.
        ahead: start the next process while one measures; for machines that measure on another device.

    Attributes:
        failed: a process has ended with an error other than of memory or time.
    """

    def __init__(self, command: list[str], *, ahead: bool, environment: dict[str, str]) -> None:
        self._command = command
        self._environment = os.environ | environment
        self._ahead = ahead
        self.failed = False
        self._next = self._start() if ahead else None

    def run(self, task: dict[str, Any], timeout_s: float) -> Any:
        """What the process returned; a string says why there is nothing."""
        process, errors = self._next or self._start()
        self._next = self._start() if self._ahead else None
        try:
            output, _ = process.communicate(json.dumps(task) + "\n", timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return "out of time"
        if process.returncode:
            # The other configurations are still worth their time.
            errors.seek(0)
            said = errors.read().strip()
            self.failed = True
            print(f"{task} failed with {process.returncode}:\n{said[-3000:]}", file=sys.stderr, flush=True)
            return f"failed: {said.splitlines()[-1] if said else process.returncode}"
        return json.loads(output.splitlines()[-1])

    def close(self) -> None:
        """End the process that still waits."""
        if self._next is not None:
            self._next[0].kill()
            self._next[0].communicate()

    def _start(self) -> tuple[subprocess.Popen[str], Any]:
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        return process, errors


def serve(measure: Callable[[dict[str, Any]], Any]) -> int:
    """Read a task, print its result; 0 also where memory ran out, which is a result."""
    from helixpipe.runtime.out_of_memory import amount_asked

    line = sys.stdin.readline()
    if not line:
        return 0
    try:
        result = measure(json.loads(line))
    except RuntimeError as error:
        # Libraries that cannot get their workspace say it in their own way.
        if amount_asked(error) is None and "ALLOC_FAILED" not in str(error):
            raise
        result = RAN_OUT
    print(json.dumps(result), flush=True)
    return 0
