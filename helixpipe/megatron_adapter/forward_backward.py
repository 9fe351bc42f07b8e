"""Megatron's ``forward_backward_func``, carried out by a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.layers.weight_gradient import defer_weight_gradients
from helixpipe.megatron_adapter.forward_step import GPTSegments, IterationInput
from helixpipe.megatron_adapter.gradient_reduction import finalize, hold_gradient_reduction
from helixpipe.megatron_adapter.pipeline_group import agree_on_plan, make_communicator
from helixpipe.megatron_adapter.segments.contract import IterationSize, ModelSegments
from helixpipe.megatron_adapter.segments.stages import StageSegments
from helixpipe.plan import Plan, ScheduleRequest, build_plan
from helixpipe.reliability.record import Progress
from helixpipe.runtime.connections import Connections
from helixpipe.runtime.executor import Executor
from helixpipe.runtime.out_of_memory import naming_operation
from helixpipe.runtime.trace import Clock, Trace, default_clock
from helixpipe.runtime.weight_gradients import DeferredWeightGradients


class PlannedForwardBackward:
    """A ``forward_backward_func`` with Megatron's signature and return value.

    The list of loss dictionaries is returned where the last segment is, and is empty on the other ranks.

    Args:
        name: of the schedule.
        options: arguments of the schedule beside the sizes, as :class:`ScheduleRequest` names them.
        chunks_per_rank: model chunks on each rank.
        clock: times the trace; chosen by the device if None.
        progress: told of every operation and wait as it begins.

    Attributes:
        trace: what the last iteration ran on this rank.
        plan: the plan of the last iteration.
    """

    def __init__(
        self,
        name: str,
        options: dict[str, Any] | None = None,
        *,
        chunks_per_rank: int = 1,
        clock: Clock | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.name = name
        self._progress = progress
        self.options = options or {}
        self.chunks_per_rank = chunks_per_rank
        self.trace = Trace(clock or default_clock())
        self.plan: Plan | None = None
        self._executors: dict[IterationSize, tuple[Executor, ModelSegments]] = {}
        self._connections: Connections | None = None

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name} ({options})" if options else self.name

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Iterator[Any] | list[Iterator[Any]] | None,
        model: torch.nn.Module | list[torch.nn.Module],
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Callable[..., Any] | None = None,
        p2p_communicator: object | None = None,
        pg_collection: object | None = None,
        force_all_reduce: bool | None = False,
    ) -> list[Any]:
        """Run one iteration; see Megatron's ``get_forward_backward_func`` for the arguments.

        Raises:
            ValueError: an argument that this schedule cannot honour.
        """
        refused = {
            "decoder_seq_length": decoder_seq_length not in (None, seq_length),
            "adjust_tensor_shapes_fn": adjust_tensor_shapes_fn is not None,
            "p2p_communicator": p2p_communicator is not None,
            "pg_collection": pg_collection is not None,
        }
        for name, is_set in refused.items():
            if is_set:
                raise ValueError(f"the {self.name} schedule does not support {name}")
        chunks = self._per_chunk(model, "model chunk")
        size = IterationSize(num_microbatches, seq_length, micro_batch_size, forward_only)
        if size not in self._executors:
            self._executors[size] = self._build(chunks, size)
        executor, segments = self._executors[size]
        self.plan = executor.plan
        segments.begin(
            IterationInput(
                forward_step_func,
                self._per_chunk(data_iterator, "data iterator"),
                num_microbatches,
                collect_non_loss_data,
                differentiate=not forward_only,
            )
        )
        with naming_operation(executor.plan, executor.communicator.rank, self.trace):
            executor.run()
        if not forward_only:
            finalize(chunks, segments, bool(force_all_reduce))
        executor.check_messages()
        return segments.result.loss_data

    def make_segments(
        self, chunks: list[torch.nn.Module], plan: Plan, size: IterationSize, dtype: torch.dtype, rank: int
    ) -> ModelSegments:
        """The computation of this rank's model chunks under ``plan``."""
        raise NotImplementedError

    def _build(self, chunks: list[torch.nn.Module], size: IterationSize) -> tuple[Executor, ModelSegments]:
        config = get_model_config(chunks[0])
        plan = build_plan(
            self.name,
            ScheduleRequest(
                num_layers=config.num_layers,
                num_ranks=parallel_state.get_pipeline_model_parallel_world_size(),
                num_microbatches=size.num_microbatches,
                **self.options,
            ),
        )
        if size.forward_only:
            plan = plan.forward_only()
        dtype = config.pipeline_dtype or config.params_dtype
        group = parallel_state.get_pipeline_model_parallel_group()
        segments = self.make_segments(chunks, plan, size, dtype, dist.get_rank(group))
        sizes = [segments.layout(edge, 0).num_elements for edge in range(plan.num_segments - 1)]
        agree_on_plan(plan, (*size, sum(sizes)), dtype, group)
        device = next(chunks[0].parameters()).device
        if self._connections is None:
            self._connections = Connections(make_communicator(group), device)
        self._connections.open_for(plan)
        communicator = self._connections.communicator
        executor = Executor(
            plan,
            segments,
            communicator,
            device=device,
            trace=self.trace,
            progress=self._progress,
            backward_context=hold_gradient_reduction(chunks, segments, plan, communicator.rank),
        )
        return executor, segments

    def _per_chunk(self, value: Any, what: str) -> list[Any]:
        """One value per model chunk: a list as it is, or the only one."""
        values = value if isinstance(value, list) else [value]
        expected = self.chunks_per_rank
        if len(values) != expected:
            wanted = f"one {what}" if expected == 1 else f"{expected} {what}s"
            raise ValueError(f"the {self.name} schedule takes {wanted} per rank, not {len(values)}")
        return values


class HelixForwardBackward(PlannedForwardBackward):
    """The helix schedule: a model cut at its attention, with the loss on pipeline rank 0 or on all.

    Args:
        num_fold: micro batches per slot.
        attention_range: pieces that the attention rank runs, the range that the model was built for.
        head_placement: where the head and the loss are: on the ``first`` rank, or ``spread`` over all, each
            of which then reads the data and returns the losses of its own micro batches.
        clock: times the trace; chosen by the device if None.
        progress: told of every operation and wait as it begins.
    """

    def __init__(
        self,
        *,
        num_fold: int = 2,
        attention_range: str = "core",
        head_placement: str = "first",
        clock: Clock | None = None,
        progress: Progress | None = None,
    ) -> None:
        options = {"num_fold": num_fold, "attention_range": attention_range}
        if head_placement != "first":
            options["head_placement"] = head_placement
        super().__init__("helix", options, clock=clock, progress=progress)

    def make_segments(
        self, chunks: list[torch.nn.Module], plan: Plan, size: IterationSize, dtype: torch.dtype, rank: int
    ) -> ModelSegments:
        """See :class:`PlannedForwardBackward`."""
        (model,) = chunks
        segmented: SegmentedGPTModel = get_attr_wrapped_model(model, "forward_segment", return_model_obj=True)
        losses = plan.placement[plan.num_segments - 1]
        return GPTSegments(
            model,
            segmented,
            size.seq_length,
            size.micro_batch_size,
            dtype,
            has_loans=bool(plan.loans),
            losses_here=[micro_batch for micro_batch, home in enumerate(losses) if home == rank],
        )


class StageForwardBackward(PlannedForwardBackward):
    """A schedule whose segments are stages: Megatron's own GPTModel chunks, run in the plan's order.

    If the plan splits the backward pass, the linear layers of the chunks learn to leave their weight
    gradients for W, see :func:`helixpipe.layers.weight_gradient.defer_weight_gradients`.
    """

    def __init__(
        self,
        name: str,
        *,
        chunks_per_rank: int = 1,
        clock: Clock | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(name, chunks_per_rank=chunks_per_rank, clock=clock, progress=progress)
        self._weight_gradients = DeferredWeightGradients()
        self._defers = False

    def make_segments(
        self, chunks: list[torch.nn.Module], plan: Plan, size: IterationSize, dtype: torch.dtype, rank: int
    ) -> ModelSegments:
        """See :class:`PlannedForwardBackward`."""
        segments = StageSegments(
            chunks, plan, rank, size.seq_length, size.micro_batch_size, dtype, self._weight_gradients
        )
        if plan.splits_backward and not self._defers:
            for chunk in chunks:
                defer_weight_gradients(chunk, self._weight_gradients.add)
            self._defers = True
        return segments
