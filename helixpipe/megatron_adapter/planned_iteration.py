"""One iteration of a plan on this rank: what all schedules that run from plans share."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from helixpipe.megatron_adapter.gradient_reduction import finalize, hold_gradient_reduction
from helixpipe.megatron_adapter.pipeline_group import make_communicator
from helixpipe.megatron_adapter.segments.contract import ModelSegments
from helixpipe.plan import Plan
from helixpipe.reliability.record import Progress
from helixpipe.runtime.connections import Connections
from helixpipe.runtime.executor import Executor
from helixpipe.runtime.out_of_memory import naming_operation
from helixpipe.runtime.trace import Clock, Trace, default_clock


class PlannedIterations:
    """Makes executors and runs them; messages of all of them take one communicator.

    Args:
        clock: times the trace; chosen by the device if None.
        progress: told of every operation and wait as it begins.

    Attributes:
        trace: what the last iteration ran on this rank.
        progress: as given; executors that were made before keep theirs.
    """

    def __init__(self, clock: Clock | None, progress: Progress | None) -> None:
        self.trace = Trace(clock or default_clock())
        self.progress = progress
        self._connections: Connections | None = None

    def executor(self, plan: Plan, segments: ModelSegments, chunks: list[torch.nn.Module]) -> Executor:
        """The executor of ``plan`` on this rank's model chunks; collective."""
        device = next(chunks[0].parameters()).device
        if self._connections is None:
            group = parallel_state.get_pipeline_model_parallel_group()
            self._connections = Connections(make_communicator(group), device)
        self._connections.open_for(plan)
        communicator = self._connections.communicator
        return Executor(
            plan,
            segments,
            communicator,
            device=device,
            trace=self.trace,
            progress=self.progress,
            backward_context=hold_gradient_reduction(chunks, segments, plan, communicator.rank),
        )

    def run(
        self,
        executor: Executor,
        segments: ModelSegments,
        chunks: list[torch.nn.Module],
        *,
        forward_only: bool,
        force_all_reduce: bool | None,
    ) -> list[Any]:
        """Run the plan and let Megatron reduce the gradients; what the loss functions reported here."""
        with naming_operation(executor.plan, executor.communicator.rank, self.trace):
            executor.run()
        segments.finish()
        if not forward_only:
            finalize(chunks, segments, bool(force_all_reduce))
        executor.check_messages()
        return segments.result.loss_data
