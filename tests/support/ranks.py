"""Run a function on several real gloo ranks, each a process of its own.

Processes are forked from a server that has already imported torch and megatron.core, so a group of
eight ranks starts in well under a second.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The server is a fresh interpreter that knows only this variable, not pytest's changes of sys.path; what it
# fails to import is imported again by every rank.
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
# The server must not start the driver, which does not survive a fork, only to see whether there is a GPU.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["preloaded"])


def run_on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 200,
    backend: str | None = "gloo",
) -> list[Any]:
    """Call ``function(*args)`` on every rank of a fresh group; the results by rank.

    Over ``nccl`` each rank has a GPU, or shares one. Without a ``backend`` there is no group: the function
    makes its own.

    ``function`` must be importable by name. Raises ``AssertionError`` with the tracebacks of the ranks that
    failed, and kills every rank after ``timeout_s``.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder) / "rendezvous")
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_entry,
                args=(rank, world_size, backend, rendezvous, theirs, function, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = multiprocessing.connection.wait(
            list(waiting.values()), timeout=max(0.0, deadline - time.monotonic())
        )
        if not ready:
            failures[-1] = f"ranks {sorted(waiting)} did not answer in time"
            break
        for rank, pipe in list(waiting.items()):
            if pipe in ready:
                del waiting[rank]
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    ok, value = False, "the process died"
                (results if ok else failures)[rank] = value
        if failures:
            # The others fail soon after, for the same reason; the first traceback is the one to read.
            deadline = min(deadline, time.monotonic() + 5)
    if failures:
        raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in failures.items()))
    return [results[rank] for rank in range(len(pipes))]


def _entry(
    rank: int,
    world_size: int,
    backend: str | None,
    rendezvous: str,
    pipe: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from helixpipe.runtime.gpu import barrier, take_gpu

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    if backend == "nccl":
        os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
        take_gpu()
    try:
        if backend is not None:
            dist.init_process_group(
                backend,
                init_method=f"file://{rendezvous}",
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=60),
            )
        _send(pipe, True, function(*args))
        if backend is not None:
            barrier()
            dist.destroy_process_group()
    except Exception:
        _send(pipe, False, traceback.format_exc())


def _send(pipe: Any, ok: bool, value: Any) -> None:
    # With tensors by value: torch's own way to send them needs the sender to be alive when they are read.
    pipe.send_bytes(pickle.dumps((ok, value)))
