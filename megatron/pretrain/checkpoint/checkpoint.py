"""Checkpoints through megatron.core.dist_checkpointing, in Megatron's folder layout.

``DIR/iter_0000010/`` holds one checkpoint, ``DIR/latest_checkpointed_iteration.txt`` names the newest whole
one, see :mod:`megatron.pretrain.checkpoint.files`. Parameters and optimizer states are stored under
canonical names, so a run may stop under one schedule and layout and go on under another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import megatron.core
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from helixpipe.reliability.exit_codes import DataError
from megatron.pretrain.checkpoint.common_state import load_with_placeholders, read_common
from megatron.pretrain.checkpoint.comparison import Change, compare_model, compare_settings, settings_of
from megatron.pretrain.checkpoint.files import (
    branch_of,
    check_file,
    is_megatron_lms,
    is_same_folder,
    iteration_of,
    manifest_of,
    share,
    tracked,
    usable,
)
from megatron.pretrain.checkpoint.inspection import faults_by_table
from megatron.pretrain.checkpoint.megatron_lm import RESHARDABLE, compare_theirs, is_readable, samples_of
from megatron.pretrain.checkpoint.optimizer_states import load_states, sharded_states
from megatron.pretrain.checkpoint.safe_pickle import (
    find_unsafe_content,
    load_plain,
    no_code_from_disk,
    read_table,
)
from megatron.pretrain.checkpoint.shards import describe
from megatron.pretrain.checkpoint.sums import differing, global_sums
from megatron.pretrain.model import TrainingState, unwrap
from megatron.pretrain.settings.job import JobSettings, ParallelSettings
from megatron.pretrain.side_outputs import say

# The form of the optimizer's state in a checkpoint.
CONTENT = {"distrib_optim_sharding_type": RESHARDABLE}


class Progress(NamedTuple):
    """How far training has come.

    Attributes:
        iteration: the last finished one.
        consumed_samples: trained on, over all replicas.
        position: in the order of samples; less than ``consumed_samples`` after a change of the data or of
            their order, which begins anew.
        evaluated_samples: position in the validation samples.
    """

    iteration: int = 0
    consumed_samples: int = 0
    position: int = 0
    evaluated_samples: int = 0


class Loaded(NamedTuple):
    """What a job goes on from.

    Attributes:
        progress: of the job that saved it.
        folder: the checkpoint; None if there was none yet.
        changes: of the settings, on purpose.
    """

    progress: Progress = Progress()
    folder: Path | None = None
    changes: tuple[Change, ...] = ()


def load_checkpoint(settings: JobSettings, root: Path, state: TrainingState) -> Loaded:
    """Restore the newest checkpoint of a folder; no progress if there is none yet.

    Only a folder that is also the one of ``--save`` may hold none: it is the first start of the job.

    Args:
        settings: of the job.
        root: ``--load``, or what takes its place, see :class:`megatron.pretrain.outputs.Outputs`.
        state: to be overwritten.

    Raises:
        DataError: an unreadable tracker, a checkpoint that is missing or damaged, or one of a job with other
            settings; on every rank, before training uses a weight.
    """
    falls_back = settings.checkpoint.load_fallback
    folder = _verified_checkpoint(settings, root, falls_back=falls_back)
    if folder is None:
        save = settings.checkpoint.save
        if save is None or not is_same_folder(root, save):
            raise DataError(
                f"--load {root} holds no checkpoint; to start anew leave it out, or name it in --save, too"
            )
        return Loaded()
    # A job that torchrun has started again goes on with all that it has saved.
    is_restart, options = root != settings.checkpoint.load, settings.checkpoint
    if options.finetune and not is_restart:
        return _load_weights_from(folder, settings, state)
    with _reading(folder):
        return _load_from(folder, settings, state, with_optimizer=is_restart or not options.no_load_optim)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Inside, a checkpoint can be read without running code of it."""
    if not is_readable(folder, megatron.core.__version__):
        raise DataError(
            f"{folder} was saved with megatron-core 0.19 or later, in a form that "
            f"{megatron.core.__version__} does not read; use 0.19 here, too"
        )
    with no_code_from_disk(load_with_placeholders if is_megatron_lms(folder) else load_plain):
        yield


def load_weights(settings: JobSettings, root: Path, state: TrainingState) -> Loaded:
    """Take the weights of the newest checkpoint of a folder; training begins with them.

    Args:
        settings: of the job.
        root: ``--pretrained-checkpoint``.
        state: whose weights are overwritten.

    Raises:
        DataError: see :func:`load_checkpoint`.
    """
    folder = _verified_checkpoint(settings, root, falls_back=False)
    if folder is None:
        raise DataError(f"--pretrained-checkpoint {root} holds no checkpoint; give a folder of --save")
    return _load_weights_from(folder, settings, state)


def _load_weights_from(folder: Path, settings: JobSettings, state: TrainingState) -> Loaded:
    with _reading(folder):
        common = read_common(folder)
        if is_megatron_lms(folder):
            changes = _compare_theirs(folder, common, settings, with_optimizer=False)
        else:
            changes = compare_model(common["settings"], settings, str(folder))
        _restore_weights(folder, common, state)
    return Loaded(folder=folder, changes=tuple(changes))


def _restore_weights(folder: Path, common: Mapping[str, Any], state: TrainingState) -> None:
    wanted = _weights_of(state)
    check_tensors(folder, wanted)
    loaded = _read(wanted, folder)
    for name, chunk in _named_models(state):
        chunk.load_state_dict(loaded[name], strict=False)
    # The optimizer has copies of its own.
    state.optimizer.reload_model_params()
    _check_sums(folder, common, _weights_of(state))


def _weights_of(state: TrainingState) -> dict[str, Any]:
    """The models' tensors in their checkpoint form, without the states of modules, which fp8 alone has."""
    tensors = (ShardedTensor, ShardedTensorFactory)
    return {
        name: {
            key: value
            for key, value in chunk.sharded_state_dict(metadata=content_metadata()).items()
            if isinstance(value, tensors)
        }
        for name, chunk in _named_models(state)
    }


def _verified_checkpoint(settings: JobSettings, root: Path, *, falls_back: bool) -> Path | None:
    """The newest checkpoint, its files found to be what was saved; ``falls_back`` to an older one if not."""
    parallel = settings.parallel
    folder = _tracked_by_all(root)
    if folder is None:
        return None
    candidates = [folder, *_older(folder)] if falls_back else [folder]
    problem = ""
    for candidate in candidates:
        problem = _problem_of(candidate, parallel)
        if not problem:
            return candidate
        if parallel.rank == 0 and falls_back:
            say(f"{problem}; trying the checkpoint before it")
    can_fall_back = root != settings.checkpoint.pretrained_checkpoint and not falls_back
    hint = "; add --load-fallback to go on from the one before it" if can_fall_back else ""
    raise DataError(problem + hint)


def _older(folder: Path) -> list[Path]:
    """The checkpoints that one goes back to, newest first."""
    try:
        return branch_of(folder)[-2::-1]
    except DataError:
        # Its damage is reported with all else.
        return [
            other for other in reversed(usable(folder.parent)) if iteration_of(other) < iteration_of(folder)
        ]


def _tracked_by_all(root: Path) -> Path | None:
    """The checkpoint that the tracker names, found to be the same one on every rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    try:
        mine: tuple[Path | None, str] = (tracked(root), "")
    except (ValueError, OSError) as error:
        mine = (None, str(error))
    seen = _gathered({rank: mine})
    for _, problem in seen.values():
        if problem:
            raise DataError(problem)
    folders: dict[int, Path | None] = {rank: folder for rank, (folder, _) in seen.items()}
    if len(set(folders.values())) > 1:
        shown = "; ".join(f"rank {r}: {f.name if f else 'no checkpoint'}" for r, f in sorted(folders.items()))
        raise DataError(f"ranks see different checkpoints in {root}: {shown}; it must be a shared folder")
    return folders[rank]


def _problem_of(folder: Path, parallel: ParallelSettings) -> str:
    """What is wrong with a checkpoint's files, the same on every rank; each hashes its share of them."""
    try:
        if is_megatron_lms(folder):
            problems = faults_by_table(folder, parallel.rank, parallel.world_size)
            return next((text for found in _by_rank(problems[:1]) for text in found), "")
        files = manifest_of(folder)
        mine = share(list(files), parallel.rank, parallel.world_size)
        found = {name: check_file(folder, name, files[name]) for name in mine}
        if parallel.rank == 0 and not any(found.values()):
            found[""] = find_unsafe_content(folder)
    except ValueError as error:
        found = {"": str(error)}
    return next((text for _, text in sorted(_gathered(found).items()) if text), "")


def _by_rank(mine: list[str]) -> list[list[str]]:
    """The lists of all ranks."""
    return list(_gathered({dist.get_rank() if dist.is_initialized() else 0: mine}).values())


def _gathered(mine: dict[Any, Any]) -> dict[Any, Any]:
    """The dictionaries of all ranks as one."""
    if not dist.is_initialized():
        return mine
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: value for part in everyone for name, value in part.items()}


def _load_from(folder: Path, settings: JobSettings, state: TrainingState, *, with_optimizer: bool) -> Loaded:
    common, here = read_common(folder), settings_of(settings)
    if is_megatron_lms(folder):
        changes = _compare_theirs(folder, common, settings, with_optimizer=with_optimizer)
        # Samples come in another order here: position 0.
        progress = Progress(int(common["iteration"]), samples_of(common))
    else:
        changes = compare_settings(common["settings"], here, settings.checkpoint.allow_changed, str(folder))
        progress = Progress(common["iteration"], **common["samples"])
        if any(change.reorders for change in changes):
            progress = progress._replace(position=0, evaluated_samples=0)
    if with_optimizer:
        _restore(folder, common, here, state)
    else:
        _restore_weights(folder, common, state)
        state.scheduler.step(increment=progress.consumed_samples)
    return Loaded(progress, folder, tuple(changes))


def _compare_theirs(
    folder: Path, common: Mapping[str, Any], settings: JobSettings, *, with_optimizer: bool
) -> list[Change]:
    allowed = settings.checkpoint.allow_changed
    return compare_theirs(folder, common, settings.options, allowed, with_optimizer=with_optimizer)


def _restore(
    folder: Path, common: Mapping[str, Any], settings: Mapping[str, Any], state: TrainingState
) -> None:
    """Overwrite weights, optimizer states and the position of the learning rate."""
    wanted = sharded_state(state, Progress(), settings, is_loading=True)
    check_tensors(folder, wanted)
    loaded = _read(wanted, folder)
    for name, chunk in _named_models(state):
        chunk.load_state_dict(loaded[name], strict=False)
    _choose_rates(loaded, state)
    chosen = [{**group} for group in state.optimizer.param_groups]
    load_states(state.optimizer, loaded["optimizer"])
    for group, options in zip(state.optimizer.param_groups, chosen, strict=True):
        # Rates, betas and the like are this job's, as far as comparing the settings has let them differ.
        group.update({name: value for name, value in options.items() if name not in ("params", "step")})
    state.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    _check_sums(folder, common, sharded_state(state, Progress(), settings, is_loading=False))


def _choose_rates(loaded: Mapping[str, Any], state: TrainingState) -> None:
    """Put this job's rates into loaded parameter groups, which since 0.19 are told apart by them, too."""
    saved = loaded["opt_param_scheduler"]
    for group in _groups_in(loaded["optimizer"]):
        for name in ("max_lr", "min_lr"):
            if group.get(name) == saved[name]:
                group[name] = getattr(state.scheduler, name)


def _groups_in(optimizer: Any) -> Iterator[dict[str, Any]]:
    """Parameter groups in an optimizer's loaded state, which is nested otherwise for each kind."""
    if isinstance(optimizer, dict):
        yield from optimizer.get("param_groups", ())
        for value in optimizer.values():
            yield from _groups_in(value)


def _read(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(folder))
    except (CheckpointException, CheckpointingException, RuntimeError) as error:
        raise DataError(f"{folder} cannot be loaded ({_reason(error)}); use another checkpoint") from None
    return loaded


def _check_sums(folder: Path, common: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Refuse weights or states in memory that are not those that were in memory when they were saved."""
    if is_megatron_lms(folder):
        # It has none.
        return
    saved, found = common["sums"], global_sums(state)
    names = differing({name: saved.get(name) for name in found}, found)
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise DataError(
            f"{folder}: {names[0]}{more} has another sum than when it was saved, and its files are whole: a "
            "bit changed in memory; load again, and if that does not help use another checkpoint"
        )


def sharded_state(
    state: TrainingState, progress: Progress, settings: Mapping[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """Everything that a checkpoint holds, as Megatron's ``dist_checkpointing`` takes it.

    Args:
        state: of the model, the optimizer and the scheduler.
        progress: that is saved.
        settings: of the job, see :func:`settings_of`.
        is_loading: the result is to be loaded into.
    """
    models = {
        name: chunk.sharded_state_dict(metadata=content_metadata()) for name, chunk in _named_models(state)
    }
    # Megatron matches optimizer states to parameters through the chunks' names.
    optimizer = sharded_states(state.optimizer, models, content_metadata(), is_loading=is_loading)
    return {
        **models,
        "optimizer": optimizer,
        "opt_param_scheduler": state.scheduler.state_dict(),
        "iteration": progress.iteration,
        "samples": {name: value for name, value in progress._asdict().items() if name != "iteration"},
        "settings": settings,
    }


def check_tensors(folder: Path, wanted: dict[str, Any]) -> None:
    """Compare the table of contents with the model: torch would convert another type without a word.

    Raises:
        DataError: a tensor that is missing, or has another type or shape.
    """
    saved = read_table(folder).state_dict_metadata
    for value in nested_values(wanted):
        parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        for tensor in parts:
            if not isinstance(tensor, ShardedTensor):
                continue
            found = saved.get(tensor.key)
            if not isinstance(found, TensorStorageMetadata):
                raise DataError(f"{folder} holds no tensor {tensor.key}; use another checkpoint")
            here = (tensor.dtype, tuple(tensor.global_shape))
            there = (found.properties.dtype, tuple(found.size))
            if here != there:
                raise DataError(
                    f"{folder} holds {tensor.key} as {there[0]} of shape {there[1]}, this job needs "
                    f"{here[0]} of shape {here[1]}; use another checkpoint"
                )


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, on the first rank where it did."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {describe(cause)}"
    return describe(error)


def _named_models(state: TrainingState) -> list[tuple[str, Any]]:
    """The unwrapped model chunks, named as in Megatron's checkpoints."""
    if len(state.model) == 1:
        return [("model", unwrap(state.model[0]))]
    return [(f"model{index}", unwrap(chunk)) for index, chunk in enumerate(state.model)]


def content_metadata() -> dict[str, Any]:
    """The form of the optimizer's state in a checkpoint, and the group that shares it.

    States are named by their parameters alone, and not by which optimizer they are of.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {**CONTENT, "dp_cp_group": group, "chained_optim_avoid_prefix": True}
