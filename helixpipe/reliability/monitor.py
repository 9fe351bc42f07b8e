"""The rank's end: starts the sentinel, tells it where the program is, and ends the process when told to."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import helixpipe
from helixpipe.reliability.deadlines import Deadlines
from helixpipe.reliability.exit_codes import PEER_LOST, leave_exit_code
from helixpipe.reliability.record import RECORD_BYTES, SharedProgress
from helixpipe.reliability.wire import Connection, Message

_PULSE_S = 0.5
_START_S = 30.0
_JOIN_S = 90.0
_PARTING_S = 30.0


class HubAddress(NamedTuple):
    """Where the hub listens; for the ranks of one job only."""

    hosts: list[str]
    port: int
    token: str


class Monitor:
    """Watches this rank through a sentinel, and the others through the hub.

    When a rank is lost, fails or hangs, the sentinel prints a line for this rank and the process ends: with 5
    after a hang and else with 4, or by SIGKILL if it cannot.

    Args:
        rank, world_size: of the job.
        program: the name at the start of messages.
        stack_folder: where stacks go after a hang; made when they do.
        deadlines: what is called a hang.
        before_exit: called just before this process is ended.

    Attributes:
        progress: to be told of operations.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        program: str,
        stack_folder: Path,
        deadlines: Deadlines,
        before_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self._rank = rank
        self._before_exit = before_exit
        self._deadlines = deadlines
        self._phase, self._step, self._entered = "", 0, time.monotonic()
        self._is_closing = self._is_sentenced = False
        memory, stacks = _shared_file("record"), _shared_file("stacks")
        os.ftruncate(memory, RECORD_BYTES)
        self.progress = SharedProgress(mmap.mmap(memory, RECORD_BYTES))
        self.enter("start")
        # Written by the signal handler itself when the interpreter hangs.
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        ours, theirs = socket.socketpair()
        self._token = secrets.token_hex(16)
        options = {
            "rank": rank,
            "world_size": world_size,
            "program": program,
            "parent": os.getpid(),
            "token": self._token,
            "memory": memory,
            "stacks": stacks,
            "channel": theirs.fileno(),
            "stack_folder": str(stack_folder),
        }
        self._sentinel = _start_sentinel(options, (memory, stacks, theirs.fileno()))
        theirs.close()
        os.close(memory)
        self._channel = Connection(ours)
        self._stacks = stacks
        self._answers: dict[str, Message] = {}
        self._answered = threading.Condition()
        threading.Thread(target=self._listen, name="helixpipe-monitor", daemon=True).start()

    def address(self, hosts: list[str]) -> HubAddress:
        """On rank 0: where the other ranks find the hub.

        Args:
            hosts: names or addresses of this host, the likeliest first.
        """
        return HubAddress(hosts, self._answer("port", _START_S)["port"], self._token)

    def join(self, address: HubAddress) -> None:
        """Let the sentinel report to the hub.

        Raises:
            ValueError: the hub cannot be reached.
        """
        self._channel.send({"hosts": address.hosts, "port": address.port, "token": address.token})
        if not self._answer("joined", _JOIN_S)["joined"]:
            raise ValueError(
                f"rank {self._rank} cannot reach rank 0 at {' or '.join(address.hosts)}, port "
                f"{address.port}; check MASTER_ADDR and the network interfaces"
            )

    def place_in_pipeline(self, ranks: list[int]) -> None:
        """The ranks of this rank's pipeline, by stage, of which messages know only the stage."""
        self._channel.send({"pipeline": ranks})

    def enter(self, phase: str, step: int | None = None) -> None:
        """A phase of the program starts, like a step, and the one before it has ended."""
        self._stand_still_if_sentenced()
        now = time.monotonic()
        if self._phase:
            self._deadlines.learn(self._phase, now - self._entered)
        self._phase, self._entered = phase, now
        self._step = self._step if step is None else step
        self.progress.enter(phase, self._step, self._deadlines.of(phase))

    def reach(self, place: str) -> None:
        """The program has come to a place within its phase, like the optimizer in a step."""
        self.progress.enter(place, self._step, self._deadlines.of(self._phase))

    def report_failure(self, error: str, *, say: bool = False) -> None:
        """This rank ends with an error, of which the others are to hear.

        Args:
            error: one line.
            say: let the sentinel print it, with where the rank was.
        """
        self._stand_still_if_sentenced()
        self._is_closing = True
        self._channel.send({"error": error, "say": say})

    def close(self) -> None:
        """This rank has ended in good order."""
        self._stand_still_if_sentenced()
        self._is_closing = True
        self._channel.send({"ended": True})
        # Where there is a verdict already, that is the answer.
        with self._answered:
            self._answered.wait_for(
                lambda: "parting" in self._answers or not self._channel.is_open, _PARTING_S
            )
        faulthandler.unregister(signal.SIGUSR2)

    def _stand_still_if_sentenced(self) -> None:
        """A rank that was stopped is let go on to say where it is, but must not go on to a good end."""
        while self._is_sentenced:
            time.sleep(1.0)

    def _answer(self, name: str, timeout_s: float) -> Message:
        with self._answered:
            if not self._answered.wait_for(lambda: name in self._answers, timeout_s):
                raise RuntimeError(f"the sentinel of rank {self._rank} does not answer")
            return self._answers[name]

    def _listen(self) -> None:
        while self._channel.is_open:
            self.progress.pulse()
            if not select.select([self._channel], [], [], _PULSE_S)[0]:
                continue
            for message in self._channel.receive():
                if "sentenced" in message:
                    self._is_sentenced = True
                    # By a thread that holds the interpreter, so that no frame changes meanwhile.
                    faulthandler.dump_traceback(self._stacks)
                    self._channel.send({"stacks": True})
                if "exit" in message:
                    self._channel.send({"exits": True})
                    self._exit(message["exit"])
                with self._answered:
                    self._answers.update(dict.fromkeys(message, message))
                    self._answered.notify_all()
        with self._answered:
            self._answered.notify_all()
        if not self._is_closing:
            sys.stderr.write(f"rank {self._rank}: error: its sentinel was killed\n")
            self._exit(PEER_LOST)

    def _exit(self, code: int) -> None:
        """End without the main thread, which may never return from a collective."""
        with contextlib.suppress(Exception):
            self._before_exit()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        leave_exit_code(code)
        os._exit(code)


def _shared_file(name: str) -> int:
    """A file in memory, which leaves nothing behind."""
    return os.memfd_create(f"helixpipe-{name}")


def _start_sentinel(options: Message, descriptors: tuple[int, ...]) -> subprocess.Popen[str]:
    root = str(Path(helixpipe.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "helixpipe.reliability.sentinel"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=descriptors,
        # Launchers signal a rank's whole process group.
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(options))
    process.stdin.close()
    return process
