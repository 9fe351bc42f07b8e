"""What a job owns while it runs: the folders and files that it writes to, and the checkpoints in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron.pretrain.checkpoint.files import (
    is_same_folder,
    lineage_of,
    of_another_program,
    tracked,
    usable,
)
from megatron.pretrain.checkpoint.publishing import finish_publishing
from megatron.pretrain.health.ownership import Locks, Owner, lock_beside, lock_in
from megatron.pretrain.health.rendezvous import agent_store, job_identity
from megatron.pretrain.settings.job import JobSettings
from megatron.pretrain.side_outputs import say

_STORE_TIMEOUT = timedelta(seconds=30)


class Outputs(NamedTuple):
    """What this job owns.

    Attributes:
        job: see :func:`job_identity`; empty on other ranks than 0.
        locks: None on other ranks than 0.
        load: where to go on from; not ``--load`` if torchrun has started the ranks again.
    """

    job: str
    locks: Locks | None
    load: Path | None

    def verify(self) -> None:
        """``OSError`` if an output has gone to another job; on rank 0."""
        if self.locks is not None:
            self.locks.verify()


@contextmanager
def own_outputs(settings: JobSettings) -> Iterator[Outputs]:
    """Own what the options name until the context is left; collective.

    Raises:
        ValueError: an output is another job's, or ``--save`` holds checkpoints that this job does not go on
            from; on every rank.
        OSError: a lock cannot be made; on every rank.
    """
    if settings.parallel.rank != 0:
        yield Outputs("", None, _agreed(None, None))
        return
    job = job_identity(agent_store(_STORE_TIMEOUT))
    locks = Locks(Owner.here(job), say)
    try:
        load, refusal = None, None
        try:
            load = _take(settings, job, locks)
        except (ValueError, OSError) as error:
            refusal = error
        yield Outputs(job, locks, _agreed(load, refusal))
    finally:
        locks.release()


def _agreed(load: Path | None, refusal: Exception | None) -> Path | None:
    """What rank 0 has found, or its refusal, on every rank."""
    outcome: list[Any] = [load, refusal]
    dist.broadcast_object_list(outcome, src=0)
    found: Path | None = outcome[0]
    if outcome[1] is not None:
        raise outcome[1]
    return found


def _take(settings: JobSettings, job: str, locks: Locks) -> Path | None:
    """Own everything, finish what was begun there, and decide what to load."""
    for flag, path, lock_of in (
        ("--trace-dir", settings.output.trace_dir, lock_in),
        ("--tensorboard-dir", settings.watching.tensorboard, lock_in),
        ("--metrics-jsonl", settings.output.metrics_jsonl, lock_beside),
        ("--memory-snapshot-path", settings.watching.memory_history, lock_beside),
    ):
        if path is not None:
            locks.take(lock_of(path), f"{flag} {path}")
    checkpoint = settings.checkpoint
    if checkpoint.save is None:
        return checkpoint.load
    locks.take(lock_in(checkpoint.save), f"--save {checkpoint.save}")
    theirs = of_another_program(checkpoint.save)
    if theirs is not None:
        raise ValueError(
            f"--save {checkpoint.save} holds {theirs.name} of another program, with which ours cannot be one "
            "series; give another folder"
        )
    for note in finish_publishing(checkpoint.save):
        say(note)
    return _source(checkpoint.load, checkpoint.save, job, sets_aside=checkpoint.set_aside_checkpoints)


def _source(load: Path | None, save: Path, job: str, *, sets_aside: bool) -> Path | None:
    """``--load``, or ``--save`` if this job, before torchrun has started it again, has saved there.

    Raises:
        ValueError: ``--save`` holds checkpoints that the job does not go on from, and is not told to leave.
    """
    there = usable(save)
    if not there or (load is not None and is_same_folder(load, save)):
        return load
    if _is_saved_by(job, save):
        return save
    if sets_aside:
        return load
    raise ValueError(
        f"--save {save} holds checkpoints of another job, up to {there[-1].name}: give --load {save} to go "
        "on from them, another folder, or --set-aside-checkpoints to keep them under other names"
    )


def _is_saved_by(job: str, root: Path) -> bool:
    try:
        newest = tracked(root)
        return newest is not None and lineage_of(newest).job == job
    except ValueError:
        return False
