"""Save checkpoints: all ranks together, in the foreground or behind training, with one outcome."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from helixpipe.reliability.exit_codes import DataError
from helixpipe.reliability.monitor import Monitor
from megatron.pretrain.checkpoint.checkpoint import CONTENT, Progress, sharded_state
from megatron.pretrain.checkpoint.comparison import settings_of
from megatron.pretrain.checkpoint.files import Saved, digest, folder_of
from megatron.pretrain.checkpoint.megatron_lm import ours_for_theirs
from megatron.pretrain.checkpoint.publishing import publish, saving_folder, start_saving
from megatron.pretrain.checkpoint.shards import BACKEND, VERSION, PlannedSave, Written, describe
from megatron.pretrain.checkpoint.sums import global_sums
from megatron.pretrain.model import TrainingState
from megatron.pretrain.outputs import Outputs
from megatron.pretrain.settings.job import JobSettings

MEGATRONS_WRITER = "mcore"


class SaveStatus(IntEnum):
    """How far this rank is with writing its part; ranks exchange it with the iteration's metrics."""

    NOTHING_TO_DO = 0
    WRITING = 1
    WRITTEN = 2
    FAILED = 3


class _Pending(NamedTuple):
    iteration: int
    plan: PlannedSave
    written: Future[Written]


class Saver:
    """Writes one checkpoint at a time on all ranks. Every method but ``status`` is collective.

    A save either is published on behalf of all ranks, or it has failed on all of them: then its files are
    removed, the checkpoints before it are untouched, and ``--on-save-failure`` decides.

    Args:
        settings: of the job, with ``--save``, if it is to save.
        say: prints a line once for the whole job.
        outputs: what the job owns; verified before anything in ``--save`` is changed.
        previous: the checkpoint in ``--save`` that the job goes on from, if it does.
        monitor: told what this rank waits for: storage may stall for longer than a step may take.
    """

    def __init__(
        self,
        settings: JobSettings,
        say: Callable[[str], None],
        outputs: Outputs,
        previous: Path | None,
        monitor: Monitor,
    ) -> None:
        self._settings = settings
        self._options = settings.checkpoint
        self._say = say
        self._outputs = outputs
        self._previous = None if previous is None else Saved.read(previous)
        self._notes: list[str] = []
        self._monitor = monitor
        self._pending: _Pending | None = None

    @property
    def status(self) -> SaveStatus:
        """This rank's part of the save that is under way."""
        if self._pending is None:
            return SaveStatus.NOTHING_TO_DO
        if not self._pending.written.done():
            return SaveStatus.WRITING
        return SaveStatus.FAILED if self._pending.written.result().error else SaveStatus.WRITTEN

    def save(self, state: TrainingState, progress: Progress, *, is_last: bool) -> None:
        """Start a save; without ``--async-save``, or if it ``is_last``, also finish it.

        Raises:
            DataError: a save failed, this or the one before it, and the job is to stop, or cannot save again.
        """
        self.finish()
        if self._start(state, progress, is_last) and (is_last or not self._options.async_save):
            self.finish(must_succeed=is_last)

    def poll(self, statuses: Sequence[SaveStatus]) -> None:
        """Finish the save in the background if every rank has written its part, or one cannot.

        Args:
            statuses: of all ranks, the same on every rank.
        """
        if SaveStatus.FAILED in statuses or set(statuses) == {SaveStatus.WRITTEN}:
            self._monitor.enter("publish")
            self.finish()

    def finish(self, *, must_succeed: bool = False) -> None:
        """Wait for the save under way and publish it; nothing if there is none.

        Raises:
            DataError: see :meth:`save`.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        # A rank that is still here when others have gone on is the one whose storage stalls.
        self._monitor.reach("write checkpoint")
        mine = pending.written.result()
        self._monitor.reach("publish checkpoint")
        everyone: list[Any] = [None] * self._settings.parallel.world_size
        dist.all_gather_object(everyone, mine)
        error = _first_error([written.error for written in everyone])
        if not error:
            error = self._from_first_rank(lambda: self._publish(pending, everyone))
        folder = folder_of(self._root, pending.iteration)
        if error:
            self._fail(pending.iteration, error, must_succeed)
        else:
            for line in (f"saved checkpoint {folder}", *self._notes):
                self._say(line)

    def _start(self, state: TrainingState, progress: Progress, must_succeed: bool) -> bool:
        """Agree on who writes what, and start to write; False if that failed already."""
        folder, overlaps = self._saving(progress.iteration), self._settings.parallel.overlap_param_gather
        error = self._from_first_rank(lambda: self._prepare(progress.iteration))
        plan = _AgreeingSave()
        if not error:
            for chunk in state.model:
                if overlaps:
                    # Parameters may still be on their way from the optimizer's shards.
                    chunk.disable_forward_pre_hook(param_sync=True)  # type: ignore[operator]
            content = sharded_state(state, progress, settings_of(self._settings), is_loading=False)
            content |= {"sums": global_sums(content), **self._for_megatron_lm(progress)}
            error = plan.plan(content, folder)
            for chunk in state.model:
                if overlaps:
                    chunk.enable_forward_pre_hook()  # type: ignore[operator]
        if error:
            self._fail(progress.iteration, error, must_succeed)
            return False
        buckets = plan.host_copy(detached=self._options.async_save)
        written: Future[Written] = Future()
        # A daemon: a rank that must end is not held up by a save that cannot be published any more.
        Thread(target=lambda: written.set_result(plan.write(buckets)), daemon=True).start()
        self._pending = _Pending(progress.iteration, plan, written)
        return True

    @property
    def _root(self) -> Path:
        assert self._options.save is not None, "nothing is saved without --save"
        return self._options.save

    def _saving(self, iteration: int) -> Path:
        return saving_folder(self._root, iteration)

    def _for_megatron_lm(self, progress: Progress) -> dict[str, Any]:
        """What Megatron-LM's program looks for; see :mod:`megatron.pretrain.checkpoint.megatron_lm`."""
        parallel, model = self._settings.parallel, asdict(self._settings.model)
        model.pop("params_dtype")
        return ours_for_theirs(
            model | settings_of(self._settings),
            consumed_samples=progress.consumed_samples,
            evaluated_samples=progress.evaluated_samples,
            world_size=parallel.world_size,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            data_parallel_size=parallel.data_parallel_size,
        )

    def _prepare(self, iteration: int) -> None:
        self._outputs.verify()
        start_saving(self._root, iteration)

    def _publish(self, pending: _Pending, everyone: list[Written]) -> None:
        self._outputs.verify()
        folder = self._saving(pending.iteration)
        pending.plan.writer.finish(pending.plan.metadata, [written.results for written in everyone])
        save_config(CheckpointingConfig(BACKEND, VERSION), str(folder))
        digests = {name: found for written in everyone for name, found in written.digests.items()}
        for path in folder.iterdir():
            if path.name not in digests:
                digests[path.name] = digest(path, to_disk=True)
        published = publish(
            self._root,
            pending.iteration,
            digests,
            job=self._outputs.job,
            previous=self._previous,
            keep=self._options.keep_checkpoints,
        )
        self._previous, self._notes = published.saved, published.notes

    def _from_first_rank(self, work: Callable[[], object]) -> str:
        """Do something on rank 0 only; what went wrong there, known to all."""
        outcome = [_attempt(work) if self._settings.parallel.rank == 0 else ""]
        dist.broadcast_object_list(outcome, src=0)
        return f"rank 0: {outcome[0]}" if outcome[0] else ""

    def _fail(self, iteration: int, error: str, must_succeed: bool) -> None:
        if self._settings.parallel.rank == 0:
            # What is left there would fill the disk further.
            shutil.rmtree(self._saving(iteration), ignore_errors=True)
        text = f"the checkpoint of iteration {iteration} was not saved ({error}); those before it are whole"
        if must_succeed or self._options.on_save_failure == "stop":
            raise DataError(text)
        self._say(f"{text}; training goes on")


class _AgreeingSave(PlannedSave):
    """A plan that is made on all ranks or on none.

    Before Megatron plans together, rank 0 alone writes a file; if that fails the others must not wait for it.
    """

    def plan(self, state: dict[str, Any], folder: Path) -> str:
        """Decide who writes what into ``folder``; what prevented it, the same on every rank."""
        self._agreed = False
        try:
            dist_checkpointing.save(
                state, str(folder), self, async_sharded_save=True, content_metadata=CONTENT
            )
        except (OSError, RuntimeError) as error:
            if self._agreed:
                raise
            return self._agree(describe(error))
        except _Refused as refused:
            return str(refused)
        return ""

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path, async_strategy: str = "") -> Any:
        """See Megatron's strategy."""
        error = self._agree("")
        if error:
            raise _Refused(error)
        # Since 0.17 it asks whose writer is to be used, of which the other one is of another package.
        strategy = (MEGATRONS_WRITER,) if async_strategy else ()
        return super().async_save(sharded_state_dict, checkpoint_dir, *strategy)

    def _agree(self, error: str) -> str:
        self._agreed = True
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        return _first_error(errors)


class _Refused(Exception):
    """Another rank cannot save."""


def _first_error(errors: Sequence[str]) -> str:
    return next((f"rank {rank}: {error}" for rank, error in enumerate(errors) if error), "")


def _attempt(work: Callable[[], object]) -> str:
    try:
        work()
    except (OSError, RuntimeError) as error:
        return describe(error)
    return ""
