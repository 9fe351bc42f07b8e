"""Ranks of a Megatron-LM job watch each other, from their first step under a schedule of ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from helixpipe.megatron_adapter.watching import join, reporting, stack_folder
from helixpipe.megatron_lm.step import Step
from helixpipe.megatron_lm.view import program_arguments
from helixpipe.reliability.deadlines import Deadlines
from helixpipe.reliability.monitor import Monitor


class StepWatch:
    """Tells this rank's sentinel of steps and evaluations; what is between them is the program's.

    Args:
        monitor: of this rank.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._has_joined = False
        self._count = 0

    @contextmanager
    def step(self, *, forward_only: bool) -> Iterator[None]:
        """A step, or one of an evaluation. The first one is collective: the ranks join each other."""
        if not self._has_joined:
            store = dist.distributed_c10d._get_default_store()
            join(dist.get_rank(), self._monitor, dist.PrefixStore("helixpipe", store))
            pipeline = parallel_state.get_pipeline_model_parallel_group()
            self._monitor.place_in_pipeline(dist.get_process_group_ranks(pipeline))
            self._has_joined = True
        self._count += not forward_only
        done = getattr(program_arguments(), "curr_iteration", None)
        number = self._count if done is None else done + (not forward_only)
        self._monitor.enter("evaluate" if forward_only else "step", number)
        yield
        self._monitor.enter("between steps")


@contextmanager
def watched(step: Step | None, program: str) -> Iterator[None]:
    """Watch this rank while a script runs inside; how it ends is told to the other ranks.

    Args:
        step: what makes its steps; None if they are Megatron's own, and nobody watches.
        program: the name at the start of messages.

    Raises:
        PeerLost: another rank has ended, and this process was not told which.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if step is None or (world_size == 1 and step.options.hang_timeout_s is None):
        yield
        return
    health = step.options
    folder = None if health.failure_dir is None else Path(health.failure_dir)
    monitor = Monitor(
        int(os.environ.get("RANK", "0")),
        world_size,
        program=program,
        stack_folder=stack_folder(folder, None, program),
        # How long the program saves or builds data nobody here knows: without a word nothing is a hang.
        deadlines=Deadlines(0.0, health.hang_timeout_s or 0.0),
    )
    step.watch(StepWatch(monitor), monitor.progress)
    with reporting(monitor):
        yield
