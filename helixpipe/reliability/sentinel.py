"""The sentinel: a process beside a rank that needs nothing from it to see how it is, and to end it.

Started by :class:`helixpipe.reliability.monitor.Monitor`; the rank is its parent.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import selectors
import signal
import socket
import sys
import time
from pathlib import Path

from helixpipe.reliability.exit_codes import PEER_LOST
from helixpipe.reliability.hub import PAUSE_S, SILENCE_S, TICK_S, Hub, status_message
from helixpipe.reliability.process import force_stacks, is_stopped, keep_stacks
from helixpipe.reliability.record import RECORD_BYTES, WAITING, RecordReader
from helixpipe.reliability.status import ALIVE, DEAD, ENDED, FAILED, STOPPED, Status
from helixpipe.reliability.wire import Connection, Message

REPORT_S = 0.5
# How long an interpreter may be out of touch before it is said to hang.
PULSE_LIMIT_S = 3.0
# The hub listens before its address is known.
CONNECT_S = 20.0
# How long one that is stopped is left so, for the stacks of those that wait for it.
STOPPED_GRACE_S = 0.5
# How long a rank may take to write its stacks, to hear that it must end, and to do so before it is killed.
STACKS_S = 3.0
HEARING_GRACE_S = 4.0
EXIT_GRACE_S = 10.0
# After its rank is gone, a sentinel stays for the verdict, and the first one for all others.
LINGER_S = 3.0
HUB_LINGER_S = 30.0


class Sentinel:
    """Watches one rank.

    Args:
        options: ``rank``, ``parent`` (its process), ``world_size``, ``program`` (the name in messages), the
            file descriptors ``memory``, ``stacks`` and ``channel``, ``stack_folder``, and the ``token`` that
            the hub of rank 0 asks for.
    """

    def __init__(self, options: Message) -> None:
        self._rank: int = options["rank"]
        self._program: str = options["program"]
        self._stack_folder = Path(options["stack_folder"])
        self._stacks: int = options["stacks"]
        memory = mmap.mmap(options["memory"], RECORD_BYTES, prot=mmap.PROT_READ)
        self._records = RecordReader(memory)
        self._parent: int = options["parent"]
        self._channel = Connection(socket.socket(fileno=options["channel"]))
        self._hub_connection: Connection | None = None
        self._hub: Hub | None = None
        if self._rank == 0:
            self._hub = Hub(options["world_size"], options["token"], lambda text: self._say(f"error: {text}"))
            self._hub.start()
            self._channel.send({"port": self._hub.port})
        self._host = socket.gethostname()
        self._stage = 0
        self._pipeline = [self._rank]
        self._error = ""
        self._has_ended = False
        self._resumed_at = self._hub_heard = time.monotonic()
        self._gone_at: float | None = None
        self._reported: Status | None = None

    def run(self) -> None:
        """Watch until the rank is gone and what there is to say about it has been said."""
        self._watch()
        if self._hub_connection is not None:
            self._hub_connection.close()
        if self._hub is not None and self._hub_connection is not None:
            self._hub.join(HUB_LINGER_S)

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._channel, selectors.EVENT_READ)
        last_tick = next_report = time.monotonic()
        while not self._is_over():
            for key, _ in selector.select(TICK_S):
                if key.fileobj is self._channel:
                    self._hear_rank(selector)
                elif self._hear_hub():
                    return
                if isinstance(key.fileobj, Connection) and not key.fileobj.is_open:
                    selector.unregister(key.fileobj)
            now = time.monotonic()
            if now - last_tick > PAUSE_S:
                self._resumed_at = self._hub_heard = now
            last_tick = now
            if not self._is_rank_alive() and self._gone_at is None:
                self._gone_at = next_report = now
                # What it has said last is heard before it is reported.
                continue
            if self._hub_connection is not None and now >= next_report:
                self._report(now)
                next_report = now + REPORT_S
            if self._is_hub_lost(now):
                self._end(_hub_lost())
                return

    def _is_over(self) -> bool:
        if self._gone_at is None:
            return False
        linger = 0.0 if self._has_ended or self._hub_connection is None else LINGER_S
        return time.monotonic() - self._gone_at > linger

    def _is_rank_alive(self) -> bool:
        return os.getppid() == self._parent

    def _is_hub_lost(self, now: float) -> bool:
        hub = self._hub_connection
        if hub is None or self._has_ended or self._gone_at is not None:
            return False
        return not hub.is_open or now - self._hub_heard > SILENCE_S

    def _hear_rank(self, selector: selectors.BaseSelector) -> None:
        for message in self._channel.receive():
            if "hosts" in message:
                self._hub_connection = self._connect(message["hosts"], message["port"], message["token"])
                if self._hub_connection is None:
                    self._channel.send({"joined": False})
                else:
                    # First, so that the hub knows of this rank from the moment on at which it has joined.
                    self._report(time.monotonic())
                    self._channel.send({"joined": True})
                    selector.register(self._hub_connection, selectors.EVENT_READ)
            if "pipeline" in message:
                self._pipeline = message["pipeline"]
                self._stage = self._pipeline.index(self._rank)
            if "error" in message:
                if message["say"]:
                    self._say_of_rank(f"{message['error']}; {self._status(time.monotonic()).position}")
                self._error = message["error"]
            if message.get("ended"):
                self._has_ended = True
                if self._hub_connection is not None:
                    self._report(time.monotonic())
                self._channel.send({"parting": True})

    def _hear_hub(self) -> bool:
        """True if the hub has given its verdict and it has been carried out."""
        assert self._hub_connection is not None
        messages = self._hub_connection.receive()
        if messages:
            self._hub_heard = time.monotonic()
        for message in messages:
            if "report" in message:
                self._report(time.monotonic(), asked=True)
            if "verdict" in message:
                self._end(message["verdict"])
                return True
        return False

    def _connect(self, hosts: list[str], port: int, token: str) -> Connection | None:
        """To the hub, by the first of its addresses that leads there."""
        end = time.monotonic() + CONNECT_S
        while time.monotonic() < end and self._is_rank_alive():
            for host in hosts:
                try:
                    connection = Connection(socket.create_connection((host, port), timeout=3.0))
                except OSError:
                    continue
                connection.send({"token": token, "rank": self._rank})
                # Another program may listen at that port of another host.
                if connection.receive():
                    self._hub_heard = time.monotonic()
                    return connection
                connection.close()
            time.sleep(TICK_S)
        return None

    def _status(self, now: float) -> Status:
        record = self._records.read()
        is_waiting = record.state == WAITING
        named = "" if record.operation is None else str(record.operation)
        peer = record.operation.peer if record.operation is not None and is_waiting else None
        # The rank may have begun before this process has heard where it is.
        peer = self._pipeline[peer] if peer is not None and peer < len(self._pipeline) else None
        return Status(
            rank=self._rank,
            stage=self._stage,
            host=self._host,
            condition=self._condition(),
            step=record.step,
            place=record.place,
            phase=record.phase,
            operation="" if is_waiting else named,
            message=named if is_waiting else "",
            peer=peer,
            last="" if record.last is None else str(record.last),
            seconds=now - max(record.since, self._resumed_at),
            deadline_s=record.deadline_s,
            answers=now - max(record.pulse, self._resumed_at) < PULSE_LIMIT_S,
            error=self._error,
        )

    def _report(self, now: float, *, asked: bool = False) -> None:
        assert self._hub_connection is not None
        self._reported = self._status(now)
        self._hub_connection.send(status_message(self._reported, asked=asked))

    def _condition(self) -> str:
        if self._error:
            return FAILED
        if self._has_ended:
            return ENDED
        if not self._is_rank_alive():
            return DEAD
        return STOPPED if is_stopped(self._parent) else ALIVE

    def _end(self, verdict: Message) -> None:
        """Say this rank's line and end the rank."""
        if self._has_ended or self._error or not self._is_rank_alive():
            return
        status = self._status(time.monotonic())
        if verdict["kind"] == "hang":
            # As it was judged: a stopped rank goes on to write its stacks, and so do those that wait for it.
            status = self._reported or status
            stacks = self._write_stacks(status, verdict["time"])
            self._say_of_rank(f"hang: stage {status.stage}, {status.position}; {stacks}")
        else:
            self._say_of_rank(f"{verdict['reason']}; this rank: {status.position}")
        self._channel.send({"exit": verdict["code"]})
        started = time.monotonic()
        limit = EXIT_GRACE_S if self._is_told("exits", HEARING_GRACE_S) else 0.0
        while self._is_rank_alive():
            if time.monotonic() - started > limit:
                os.kill(self._parent, signal.SIGKILL)
                return
            time.sleep(0.02)

    def _write_stacks(self, status: Status, when: str) -> str:
        self._channel.send({"sentenced": True})
        may_answer = status.answers
        if status.condition == STOPPED:
            # Those that wait for it write theirs first, where they wait.
            time.sleep(STOPPED_GRACE_S)
            os.kill(self._parent, signal.SIGCONT)
            may_answer = True
        if not may_answer or not self._is_told("stacks", STACKS_S):
            force_stacks(self._parent, self._stacks)
        return keep_stacks(self._stacks, self._stack_folder / f"stacks_{when}_rank_{self._rank}.txt")

    def _is_told(self, word: str, within_s: float) -> bool:
        """True once the rank has sent a message with this word."""
        end = time.monotonic() + within_s
        while self._is_rank_alive() and time.monotonic() < end:
            if select.select([self._channel], [], [], 0.02)[0]:
                if any(word in message for message in self._channel.receive()):
                    return True
                if not self._channel.is_open:
                    time.sleep(0.02)
        return False

    def _say_of_rank(self, text: str) -> None:
        self._say(f"rank {self._rank}: error: {text}")

    def _say(self, text: str) -> None:
        # In one write: ranks share the terminal.
        os.write(sys.stderr.fileno(), f"{self._program}: {text}\n".encode())


def _hub_lost() -> Message:
    return {"kind": "lost", "code": PEER_LOST, "reason": "rank 0 was lost: its host no longer answers"}


def main() -> None:
    """Watch the parent, with the options that it has written to standard input."""
    options = json.load(sys.stdin)
    # A terminal's or a launcher's signal is for the ranks; this process ends when its rank has.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Sentinel(options).run()


if __name__ == "__main__":
    main()
