"""How much memory a job took, a warning when it is nearly all, and what to do when there is no more."""

from __future__ import annotations

import functools
import resource
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from helixpipe.megatron_adapter.schedule import device
from helixpipe.plan.cost_model import HARDWARE, Recompute, costs_of_plan, predict_pieces
from helixpipe.plan.simulation.memory import peak_bytes
from helixpipe.runtime.out_of_memory import OutOfMemory, amount_asked, held
from megatron.pretrain.settings.job import JobSettings

_GIB = 2**30
# Beyond this share of the limit the next longer message or fragment may not fit.
_CLOSE = 0.9


class Peak(NamedTuple):
    """Bytes at the highest point so far: in tensors, and taken from the device for them."""

    allocated: int
    reserved: int


def peak() -> Peak:
    """Of this process; on a CPU, whose allocator keeps no figures, its resident memory is both."""
    if torch.cuda.is_available():
        return Peak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Peak(resident, resident)


class MemoryWatch:
    """Warns this rank's user once, and sums up all ranks at the end.

    Args:
        settings: of the job; ``--memory-limit-gib`` stands for what the device has.
    """

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._warned = False
        self._limit: float | None = None
        if settings.memory.memory_limit_gib is not None:
            self._limit = settings.memory.memory_limit_gib * _GIB
        elif torch.cuda.is_available():
            self._limit = torch.cuda.mem_get_info()[1]

    def check(self) -> None:
        """Write a line to stderr when memory comes close to the limit for the first time."""
        reserved = peak().reserved
        if self._limit is None or self._warned or reserved < _CLOSE * self._limit:
            return
        self._warned = True
        sys.stderr.write(
            f"pretrain_gpt: rank {self._settings.parallel.rank}: warning: {reserved / _GIB:.2f} GiB of "
            f"{self._limit / _GIB:.2f} GiB were in use; {self._estimate()}; "
            f"{what_to_change(self._settings)}\n"
        )

    def summary(self) -> str:
        """One line about every rank; collective."""
        table = torch.zeros(dist.get_world_size(), 2, dtype=torch.float64, device=device())
        table[dist.get_rank()] = torch.tensor(peak(), dtype=torch.float64)
        dist.all_reduce(table)
        if torch.cuda.is_available():
            shown = [
                f"{allocated / _GIB:.2f}/{reserved / _GIB:.2f}" for allocated, reserved in table.tolist()
            ]
            return f"peak memory by rank (GiB allocated/reserved): {' '.join(shown)}"
        shown = [f"{resident / _GIB:.2f}" for resident, _ in table.tolist()]
        return f"peak memory by rank (GiB resident; a CPU's allocator has no figures): {' '.join(shown)}"

    def _estimate(self) -> str:
        """The plan's peak on this rank: weights, gradients, optimizer state and activations."""
        plan = self._settings.schedule.plan
        if plan is None:
            return "every batch is planned to stay below the limit, by the bytes of --elastic-costs"
        # Bytes do not depend on rates.
        pieces = predict_pieces(self._settings.workload, HARDWARE["h100"])
        try:
            costs = costs_of_plan(pieces, plan, self._settings.memory.levels)
        except ValueError as error:
            # A plan from a file knows nothing of layers that recompute differently.
            return f"there is no estimate of the plan's: {error}"
        peak = peak_bytes(plan, costs)[parallel_state.get_pipeline_model_parallel_rank()]
        return f"the plan's estimate is {peak / _GIB:.2f} GiB"


def explains_out_of_memory(run: Callable[..., int]) -> Callable[..., int]:
    """Decorate a function of the settings: where memory runs out, say what to change.

    Raises:
        OutOfMemory: one line for the job's user, in the place of an allocator's error.
    """

    @functools.wraps(run)
    def wrapper(settings: JobSettings, *others: Any, **named: Any) -> int:
        try:
            return run(settings, *others, **named)
        except OutOfMemory as error:
            raise OutOfMemory(f"{error}; {what_to_change(settings)}") from error
        except RuntimeError as error:
            asked = amount_asked(error)
            if asked is None:
                raise
            raise OutOfMemory(
                "out of memory outside of forward and backward passes, where weights, gradients and "
                f"optimizer state are made and used: asked for {asked}{held()}; to need less: "
                "--use-distributed-optimizer over more data-parallel ranks, or more tensor- or "
                "pipeline-parallel ranks"
            ) from error

    return wrapper


def what_to_change(settings: JobSettings) -> str:
    """What would need less memory, from the cheapest in time to the dearest; only what is not done yet."""
    granularity, saving = settings.memory.recompute_granularity, settings.memory.memory_saving
    advice = []
    if settings.model.transformer_impl != "transformer_engine":
        advice += _smaller("--mlp-chunk-size", saving.mlp_chunk_size)
    advice += _smaller("--loss-chunk-size", saving.loss_chunk_size)
    execution, plan = settings.schedule.execution, settings.schedule.plan
    parameters = {} if plan is None else plan.parameters
    if plan is None:
        advice.append("a lower --memory-limit-gib")
    elif (
        execution.recomputes_parts_of_layers
        and granularity is None
        and saving.recompute is not Recompute.WITHOUT_ATTENTION
    ):
        advice.append("--recompute-levels without-attention")
    elif execution.recomputes_whole_layers and granularity != "full":
        advice.append(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
            + (" --recompute-levels none" if saving.recomputes else "")
        )
    if parameters.get("attention_range", "block") != "block":
        advice.append("--attention-range block")
    if plan is not None and any(not context.is_resent for context in plan.contexts):
        advice.append("--resend-context")
    if "num_slices" in parameters:
        advice.append(f"--num-slices {2 * int(parameters['num_slices'])}")
    if parameters.get("num_fold", 1) != 1 and not execution.has_slices:
        advice.append("--num-fold 1")
    if settings.training.micro_batch_size > 1:
        advice.append("--micro-batch-size 1")
    advice.append("more tensor- or pipeline-parallel ranks")
    return f"to need less: {', or '.join(advice)}"


def _smaller(option: str, size: int | None) -> list[str]:
    if size is None:
        return [f"{option} auto"]
    return [f"{option} {size // 2}"] if size > 1 else []
