"""The process that plans in the background: ``python -m …service.planner_process FD PARENT``.

It reads requests from a socket and answers each with a plan. It ends with the process that started it,
however that ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue

from helixpipe.elastic.elastic_plan import ElasticPlan
from helixpipe.elastic.job import ElasticJob
from helixpipe.elastic.search.choice import choose_plan

# How much it gives way to training where no core is idle.
_NICENESS = 10
_WATCH_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Request:
    """What :func:`helixpipe.elastic.search.choice.choose_plan` shall plan."""

    lengths: tuple[int, ...]
    job: ElasticJob
    slice_counts: Sequence[int]


@dataclass(frozen=True)
class Answer:
    """A plan or, in ``error``, why there is none; and the seconds that it took to find out."""

    plan: ElasticPlan | None
    error: str
    seconds: float


def answer(request: Request) -> Answer:
    """Plan what a request asks for; no exception gets out."""
    started = time.perf_counter()
    plan, error = None, ""
    try:
        plan = choose_plan(request.lengths, request.job, slice_counts=request.slice_counts).plan
    except ValueError as found:
        error = str(found)
    except Exception as found:  # whatever it is, training goes on with another plan
        error = f"{type(found).__name__}: {found}"
    return Answer(plan, error, time.perf_counter() - started)


def main() -> None:
    """Serve until the other end of the socket is closed."""
    # Ctrl-C reaches the whole process group; it is the trainer that decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICENESS)
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    requests: SimpleQueue[Request] = SimpleQueue()
    threading.Thread(target=_read, args=(connection, parent, requests), daemon=True).start()
    while True:
        connection.send(answer(requests.get()))


def _read(connection: Connection, parent: int, requests: SimpleQueue[Request]) -> None:
    """Take requests while plans are made, and end the process when there is nobody left to ask."""
    try:
        # A child that the trainer has forked may hold the other end open after the trainer's death.
        while os.getppid() == parent:
            if connection.poll(_WATCH_INTERVAL_S):
                requests.put(connection.recv())
    except (EOFError, OSError):
        pass
    os._exit(0)


if __name__ == "__main__":
    # Under its own name, so that the answers' class is the one that the trainer knows.
    from helixpipe.elastic.service import planner_process

    planner_process.main()
