"""Whole training runs inside the ranks of a test, one after the other, with faults put into them."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

import pretrain_gpt
from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset
from helixpipe.layers.experts import is_of_expert
from helixpipe.megatron_adapter import cpu_backend
from helixpipe.reliability.exit_codes import exit_code_of
from helixpipe.reliability.record import NoProgress
from megatron.pretrain import loop
from megatron.pretrain.checkpoint import files, publishing, saver, shards
from megatron.pretrain.checkpoint.parameter_names import canonical_names
from megatron.pretrain.checkpoint.shards import HashingFile
from megatron.pretrain.initialize import seed_random_states
from megatron.pretrain.model import unwrap
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.job import JobSettings

real_fsync = os.fsync


class Fault:
    """What goes wrong in a run; the base class does nothing.

    Attributes:
        iteration: the one that is being computed.
        runs: how often it has been computed.
        settings: of the run.
        monitor: of the run.
        seen: what else there is to tell.
    """

    iteration = 0
    runs = 0
    settings: JobSettings
    monitor: _Unwatched
    seen: list[Any]

    def on_build(self, state: Any, schedule: Any) -> None:
        """The model exists."""

    def on_step(self) -> None:
        """Gradients of ``iteration`` are about to be computed."""

    def on_gradients(self, state: Any) -> None:
        """They have been computed."""


class BadModule(Fault):
    """One module's output (or the gradient of it) becomes ``value`` in one micro batch of iteration 2."""

    def __init__(
        self,
        name: str,
        *,
        micro_batch: int,
        value: float,
        rank: int | None = None,
        backward: bool = False,
        times: int = 99,
    ) -> None:
        self.rank = rank
        self.name, self.micro_batch, self.value = name, micro_batch, value
        self.backward, self.times = backward, times

    def on_build(self, state: Any, schedule: Any) -> None:
        for chunk in state.model:
            module = dict(unwrap(chunk).named_modules()).get(self.name)
            if module is not None and self.rank in (None, dist.get_rank()):
                module.register_forward_hook(lambda _, inputs, output: self._spoil(schedule, output))

    def _spoil(self, schedule: Any, output: Any) -> Any:
        now = schedule.trace.current
        if (
            now is None
            or now.micro_batch != self.micro_batch
            or self.iteration != 2
            or self.runs > self.times
        ):
            return output
        first, *rest = output if isinstance(output, tuple) else (output,)
        if self.backward:
            if first.requires_grad:  # not where the module will be computed again
                first.register_hook(lambda gradient: gradient * self.value)
        else:
            first = first * self.value
        return (first, *rest) if isinstance(output, tuple) else first


class FlippedBit(Fault):
    """One bit of one reduced gradient, or weight, changes on one rank in iteration 2."""

    def __init__(self, rank: int, what: str) -> None:
        self.rank, self.what = rank, what

    def on_gradients(self, state: Any) -> None:
        if self.iteration == 2 and dist.get_rank() == self.rank:
            parameter = list(unwrap(state.model[0]).parameters())[3]
            tensor = parameter.main_grad if self.what == "gradient" else parameter.data
            bits = tensor.view(-1).view(torch.int32)
            bits[7] ^= 1 << 3


class WrongOnce(Fault):
    """One bit of what a module puts out is wrong once in a micro batch of iteration 2."""

    def __init__(self, name: str, rank: int) -> None:
        self.name, self.rank = name, rank

    def on_build(self, state: Any, schedule: Any) -> None:
        for chunk in state.model:
            module = dict(unwrap(chunk).named_modules()).get(self.name)
            if module is not None and dist.get_rank() == self.rank:
                self._spoil(module)

    def _spoil(self, module: Any) -> None:
        forward, done = module.forward, []

        def forward_once_wrong(*arguments: Any, **named: Any) -> Any:
            output = forward(*arguments, **named)
            if self.iteration == 2 and not done:
                done.append(True)
                with torch.no_grad():
                    first = output[0] if isinstance(output, tuple) else output
                    first.detach().view(-1).view(torch.int32)[7] ^= 1
            return output

        module.forward = forward_once_wrong


class FlippedCopy(Fault):
    """One bit changes in the copy in host memory that is about to be written."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_build(self, state: Any, schedule: Any) -> None:
        if dist.get_rank() == self.rank:
            original = shards.PlannedSave.host_copy

            def spoiled(plan: Any, **options: Any) -> Any:
                shards.PlannedSave.host_copy = original
                buckets = original(plan, **options)
                _, _, (_, ((_, tensor), *_)) = buckets[0]
                tensor.view(-1).view(torch.int32)[0] ^= 1
                return buckets

            shards.PlannedSave.host_copy = spoiled


class FlippedStates(Fault):
    """One bit of an optimizer state changes on one rank while a checkpoint is put together."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_build(self, state: Any, schedule: Any) -> None:
        if dist.get_rank() == self.rank:
            load = state.optimizer.load_state_dict

            def loaded(states: Any) -> None:
                load(states)
                (optimizer,) = state.optimizer.chained_optimizers
                moments = next(iter(optimizer.optimizer.state.values()))
                moments["exp_avg"].view(-1).view(torch.int32)[0] ^= 1

            state.optimizer.load_state_dict = loaded


class Signalled(Fault):
    """Signals reach one rank, or each rank in an iteration of its own."""

    def __init__(self, *when: tuple[int, int, signal.Signals]) -> None:
        self.when = when

    def on_step(self) -> None:
        for rank, iteration, number in self.when:
            if (rank, iteration) == (dist.get_rank(), self.iteration):
                os.kill(os.getpid(), number)


class FullDisk(Fault):
    """The device under one rank's files is full while iteration 2 is saved."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_build(self, state: Any, schedule: Any) -> None:
        if dist.get_rank() == self.rank:
            shards.Path = self._path

    @staticmethod
    def _path(name: str) -> Path:
        return Path("/dev/full" if "iter_0000002" in name else name)


class BadStorage(Fault):
    """What one rank writes of iteration 2 cannot be brought to disk: the device reports an error."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_build(self, state: Any, schedule: Any) -> None:
        if dist.get_rank() == self.rank:
            os.fsync = self._fsync

    def _fsync(self, descriptor: int) -> None:
        if "iter_0000002" in os.readlink(f"/proc/self/fd/{descriptor}"):
            self.on_sync()
        real_fsync(descriptor)

    def on_sync(self) -> None:
        """Something of iteration 2 is on its way."""
        raise OSError(errno.EIO, os.strerror(errno.EIO))


class StalledStorage(BadStorage):
    """It stands still until training has come to ``iteration``, and then to ``place``, if one is given.

    Args:
        rank: where.
        files: of the checkpoint that stall, by what is in their names; the folder itself has none.
        iteration: that training computes meanwhile.
        place: of the program, as the monitor is told of it.
        ending: what follows; with ``"error"``, the one of a broken device.
    """

    def __init__(
        self, rank: int, files: str, *, iteration: int = 0, place: str = "", ending: str = ""
    ) -> None:
        super().__init__(rank)
        self.files, self.until, self.place, self.ending = files, iteration, place, ending

    def _fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if "iter_0000002" in str(path) and self.files in path.name:
            self.on_sync()
        real_fsync(descriptor)

    def on_sync(self) -> None:
        while self.iteration < self.until or self.place not in (self.monitor.place, ""):
            time.sleep(0.01)
        # A rank that waits for this one must have begun to.
        time.sleep(0.2)
        self.seen.append((self.iteration, self.monitor.phase, self.monitor.place))
        if self.ending:
            super().on_sync()


class KilledSave(Fault):
    """SIGKILL while iteration 2 is saved.

    Args:
        point: ``"before a shard"``, ``"within a shard"``, ``"after the shards"``, ``"before publishing"`` or
            ``"before the tracker"``.
    """

    def __init__(self, point: str) -> None:
        self.point = point

    def on_step(self) -> None:
        if self.iteration != 2:
            return
        owner, name = {
            "before a shard": (HashingFile, "__enter__"),
            "within a shard": (HashingFile, "write"),
            "after the shards": (saver, "save_config"),
            "before publishing": (saver, "publish"),
            "before the tracker": (publishing, "write_whole"),
        }[self.point]
        original = getattr(owner, name)

        def killing(*arguments: Any, **named: Any) -> Any:
            if self.point == "within a shard":
                stream, block = arguments
                original(stream, bytes(block)[: len(block) // 2])
                stream._stream.flush()
            elif self.point == "before the tracker" and arguments[0].name != files.TRACKER:
                return original(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        setattr(owner, name, killing)


class BlockedFolder(Fault):
    """A file stands where the folder of iteration 2's checkpoint is to be made."""

    def on_step(self) -> None:
        if self.iteration == 2 and dist.get_rank() == 0:
            (self.settings.checkpoint.save / "iter_0000002.saving").touch()


class Snapshot(Fault):
    """No fault: notes weights and optimizer states by name before an iteration, random states after it."""

    def __init__(self, iteration: int) -> None:
        self.when = iteration

    def on_step(self) -> None:
        if self.iteration == self.when:
            self.seen.append(dict(_named_states(self.state)))

    def on_gradients(self, state: Any) -> None:
        if self.iteration == self.when:
            states = tensor_parallel.get_cuda_rng_tracker().get_states()
            self.seen.append({**states, "torch": torch.get_rng_state()})

    def on_build(self, state: Any, schedule: Any) -> None:
        self.state = state


def _named_states(state: Any) -> Iterator[tuple[tuple[str, str, int], torch.Tensor]]:
    """``(parameter, kind, first element), flat tensor``: this rank's parts of what training has learned.

    Several ranks may have the same part.
    """
    shared, *others = state.optimizer.chained_optimizers
    is_sharded = isinstance(shared, DistributedOptimizer)
    for chunk in state.model:
        for name, parameter in canonical_names(chunk):
            optimizer = others[0] if others and is_of_expert(parameter) else shared
            yield (name, "weight", 0), parameter.detach().clone().flatten()
            if not is_sharded:
                found, first = optimizer.optimizer.state[parameter], 0
            elif parameter in optimizer.model_param_group_index_map:
                found = optimizer._get_main_param_and_optimizer_states(parameter)
                first = optimizer._get_model_param_range_map(parameter)["param"].start
            else:
                continue  # another data-parallel rank has all of it
            # There are none before the first step.
            for kind in {"exp_avg", "exp_avg_sq", "step"} & found.keys():
                yield (name, kind, 0 if kind == "step" else first), found[kind].detach().clone().flatten()


def small_model(folder: Path) -> str:
    """Arguments of a model that trains in a moment, on data that is prepared in ``folder``."""
    prefix, source = folder / "json", Path(sysconfig.get_path("stdlib")) / "json"
    prepare_dataset(PreparationOptions([str(source)], str(prefix), pattern="*.py", tokenizer="byte"))
    return (
        "--num-layers 4 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --micro-batch-size 1 "
        f"--global-batch-size 4 --train-iters 3 --lr 3e-3 --data-path {prefix}"
    )


def losses_of(outcome: dict[str, Any]) -> dict[str, float]:
    """The losses that a run of :func:`run_cases` has printed, by iteration."""
    lines = [line for line in outcome["lines"] if "lm loss:" in line]
    return {line.split("/")[0].split()[-1]: float(line.split("lm loss:")[1].split()[0]) for line in lines}


def run_cases(
    cases: list[tuple[str, Fault]],
    tensor: int,
    pipeline: int,
    common: str,
    context: int = 1,
    expert: int = 1,
    expert_tensor: int | None = None,
) -> list[dict[str, Any]]:
    """Run ``pretrain_gpt.py common + options`` with each fault; what each run came to on this rank."""
    cpu_backend.install()
    parallel_state.initialize_model_parallel(
        tensor,
        pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=tensor if expert_tensor is None else expert_tensor,
    )
    return [_run(f"{common} {options}".split(), fault) for options, fault in cases]


def _run(arguments: list[str], fault: Fault) -> dict[str, Any]:
    settings = parse_arguments(arguments)
    fault.settings, fault.monitor, fault.seen = settings, _Unwatched(), []
    seed_random_states(settings.training.seed)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(settings.schedule.virtual_stages)
    before: dict[int, list[torch.Tensor]] = {}
    seen: dict[str, Any] = {}
    lines: list[str] = []
    build, compute = loop.build_training_state, loop._Run._compute_gradients

    def build_and_spoil(settings: Any) -> Any:
        seen["state"] = build(settings)
        fault.on_build(seen["state"], seen["schedule"])
        return seen["state"]

    def make_forward_backward(*options: Any) -> Any:
        seen["schedule"] = original(*options)
        return seen["schedule"]

    def compute_and_spoil(run: Any, iteration: int, data: Any) -> Any:
        fault.runs = fault.runs + 1 if iteration == fault.iteration else 1
        fault.iteration = iteration
        before.setdefault(iteration, _everything(seen["state"]))
        fault.on_step()
        losses = compute(run, iteration, data)
        fault.on_gradients(seen["state"])
        return losses

    original: Callable[..., Any] = loop.make_forward_backward
    with (
        mock.patch.object(loop, "build_training_state", build_and_spoil),
        mock.patch.object(loop, "make_forward_backward", make_forward_backward),
        mock.patch.object(loop._Run, "_compute_gradients", compute_and_spoil),
        mock.patch.object(shards, "Path", Path),
        mock.patch.object(os, "fsync", real_fsync),
        mock.patch("builtins.print", lambda text, **_: lines.append(text)),
    ):
        try:
            code, error = loop._train(settings, pretrain_gpt.forward_step, fault.monitor), ""
        except ValueError as raised:
            code, error = exit_code_of(raised), str(raised)
    # A job that is refused at once builds none.
    now = _everything(seen["state"]) if "state" in seen else []
    last = before[max(before)] if before else now
    # Before the first step there are no moments.
    unchanged = len(last) == len(now) and all(map(torch.equal, last, now))
    return {
        "code": code,
        "error": error,
        "unchanged": unchanged,
        "lines": lines,
        "seen": fault.seen,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


class _Unwatched:
    """In the place of the monitor, which would end this process; remembers where it was."""

    progress = NoProgress()
    phase = place = ""

    def enter(self, phase: str, step: int | None = None) -> None:
        self.phase = self.place = phase

    def reach(self, place: str) -> None:
        self.place = place


def _everything(state: Any) -> list[torch.Tensor]:
    """Copies of weights and optimizer moments."""
    tensors = [parameter for chunk in state.model for parameter in chunk.parameters()]
    for part in state.optimizer.chained_optimizers:
        for moments in part.optimizer.state.values():
            tensors += [value for value in moments.values() if isinstance(value, torch.Tensor)]
    return [tensor.detach().clone() for tensor in tensors]
