"""A rank that only pretends to work, watched by a real sentinel: ``watched_rank.py RANK WORLD_SIZE FOLDER``.

It follows ``ROLES``, one role per rank: ``work`` ends well after a while; ``wait N`` waits for rank N for
ever; ``absent`` never joins; the others are ways to fail.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helixpipe.plan.operation import Operation
from helixpipe.reliability.deadlines import Deadlines
from helixpipe.reliability.monitor import HubAddress, Monitor

HANGING = {"stop", "hold", "absent"}
DEADLINE_S, LONG_DEADLINE_S = 5.0, 60.0


class StepDeadlines(Deadlines):
    """Short in steps where somebody hangs; ranks start seconds apart on a busy machine."""

    def of(self, phase: str) -> float:
        return DEADLINE_S if phase == "step" and self._fixed_s else LONG_DEADLINE_S


def _hold_interpreter() -> None:
    lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)


def _play(role: str, monitor: Monitor, others_wait: Callable[[], bool], wait_begins: Path) -> None:
    name, _, peer = role.partition(" ")
    monitor.enter("step", 3)
    monitor.progress.begin(Operation.parse("2F1"))
    if name == "wait":
        monitor.progress.wait(Operation.parse(f"1RECV_F1@{peer}"))
        wait_begins.touch()
        time.sleep(1000)
    while not others_wait():
        time.sleep(0.02)
    if name == "work":
        for _ in range(8):
            time.sleep(0.25)
            monitor.progress.begin(Operation.parse("2F1"))
    elif name == "fail":
        monitor.report_failure("ValueError: no more", say=True)
        # As a job does, so that the others hear of it from this rank.
        time.sleep(3)
        sys.exit(1)
    else:
        {
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            # Once it goes on it must not come to the good end that it tries to.
            "stop": lambda: (os.kill(os.getpid(), signal.SIGSTOP), monitor.enter("step", 4)),
            "hold": _hold_interpreter,
            "lose": lambda: (os.kill(monitor._sentinel.pid, signal.SIGKILL), time.sleep(1000)),
        }[name]()


def main() -> None:
    """Join the others through a file, then do what the role says."""
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    roles = os.environ["ROLES"].split(",")
    role, names = roles[rank], {role.split()[0] for role in roles}
    hangs = bool(names & HANGING) or names == {"wait"}
    if role == "absent":
        time.sleep(3)
        sys.exit(9)
    monitor = Monitor(
        rank,
        world_size,
        program="job",
        stack_folder=folder / "stacks",
        deadlines=StepDeadlines(LONG_DEADLINE_S, DEADLINE_S if hangs else None),
    )
    address = folder / "address"
    if rank == 0:
        (folder / "draft").write_text(json.dumps(monitor.address(["no.such.host.invalid", "localhost"])))
        (folder / "draft").rename(address)
    while not address.exists():
        time.sleep(0.02)
    monitor.join(HubAddress(*json.loads(address.read_text())))
    monitor.place_in_pipeline(list(range(world_size)))
    (folder / f"joined_{rank}").touch()
    present = sum(other != "absent" for other in roles)
    while len(list(folder.glob("joined_*"))) < present:
        time.sleep(0.02)
    waiting = sum(other.startswith("wait") for other in roles)
    _play(role, monitor, lambda: len(list(folder.glob("waits_*"))) >= waiting, folder / f"waits_{rank}")
    monitor.close()


if __name__ == "__main__":
    main()
