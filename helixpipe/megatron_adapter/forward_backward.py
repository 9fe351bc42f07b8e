"""Megatron's ``forward_backward_func``, carried out by a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.layers.weight_gradient import defer_weight_gradients
from helixpipe.megatron_adapter.forward_step import IterationInput
from helixpipe.megatron_adapter.pipeline_group import agree_on_plan, check_groups
from helixpipe.megatron_adapter.plan_source import GivenPlan, PlanOnDemand, PlanSource
from helixpipe.megatron_adapter.planned_iteration import PlannedIterations
from helixpipe.megatron_adapter.segments.contract import IterationSize, ModelSegments
from helixpipe.megatron_adapter.segments.helix import GPTSegments
from helixpipe.megatron_adapter.segments.sliced_helix import SlicedGPTSegments
from helixpipe.megatron_adapter.segments.slices import SliceSegments, operations_of_layer
from helixpipe.megatron_adapter.segments.stages import StageSegments
from helixpipe.plan import Plan
from helixpipe.plan.slice_ends import cut_at_equal_times, slice_ends
from helixpipe.refusals import refuse
from helixpipe.reliability.record import Progress
from helixpipe.runtime.executor import Executor
from helixpipe.runtime.trace import Clock, Trace
from helixpipe.runtime.weight_gradients import DeferredWeightGradients


class PlannedForwardBackward:
    """A ``forward_backward_func`` with Megatron's signature and return value.

    The list of loss dictionaries is returned where the last segment is, and is empty on the other ranks.

    Args:
        plans: the plan to execute, or where to get one for the sizes of a call.
        clock: times the trace; chosen by the device if None.
        progress: told of every operation and wait as it begins.

    Attributes:
        plan: the plan of the last iteration; None before the first, if it is made on demand.
    """

    def __init__(
        self, plans: Plan | PlanSource, *, clock: Clock | None = None, progress: Progress | None = None
    ) -> None:
        self._source: PlanSource = GivenPlan(plans) if isinstance(plans, Plan) else plans
        self.plan: Plan | None = plans if isinstance(plans, Plan) else None
        self._iterations = PlannedIterations(clock, progress)
        self._executors: dict[IterationSize, tuple[Executor, ModelSegments]] = {}
        self._weight_gradients = DeferredWeightGradients()
        self._defers = False

    def __str__(self) -> str:
        return str(self._source)

    @property
    def name(self) -> str:
        """Of the schedule."""
        return self._source.schedule

    @property
    def chunks_per_rank(self) -> int:
        """Model chunks on each rank."""
        return self._source.chunks_per_rank

    def report_to(self, progress: Progress) -> None:
        """Tell ``progress`` of every operation; to be called before the first iteration."""
        assert not self._executors
        self._iterations.progress = progress

    @property
    def trace(self) -> Trace:
        """What the last iteration ran on this rank."""
        return self._iterations.trace

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
        refuse(
            {
                "decoder_seq_length": decoder_seq_length not in (None, seq_length),
                "adjust_tensor_shapes_fn": adjust_tensor_shapes_fn is not None,
            },
            f"the {self.name} schedule does not support {{}}",
        )
        check_groups(pg_collection, p2p_communicator, self.name)
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
        return self._iterations.run(
            executor, segments, chunks, forward_only=forward_only, force_all_reduce=force_all_reduce
        )

    def make_segments(
        self, chunks: list[torch.nn.Module], plan: Plan, size: IterationSize, dtype: torch.dtype, rank: int
    ) -> ModelSegments:
        """The computation of this rank's model chunks under ``plan``."""
        raise NotImplementedError

    def fitted(self, plan: Plan, config: TransformerConfig, size: IterationSize) -> Plan:
        """The plan with what depends on the model and its sequences.

        Slices whose ends it does not say get ends by floating-point operations.
        """
        if not plan.slices or slice_ends(plan) is not None:
            return plan
        shared = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return cut_at_equal_times(plan, size.seq_length, operations_of_layer(config), shared)

    def modules_with_weights(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """What holds the linear layers that this rank computes with, whoever owns the weights."""
        return chunks

    def _build(self, chunks: list[torch.nn.Module], size: IterationSize) -> tuple[Executor, ModelSegments]:
        config = get_model_config(chunks[0])
        plan = self._source.plan_for(
            num_layers=config.num_layers,
            num_ranks=parallel_state.get_pipeline_model_parallel_world_size(),
            num_microbatches=size.num_microbatches,
        )
        plan = self.fitted(plan, config, size)
        if size.forward_only:
            plan = plan.forward_only()
        dtype = config.pipeline_dtype or config.params_dtype
        group = parallel_state.get_pipeline_model_parallel_group()
        segments = self.make_segments(chunks, plan, size, dtype, dist.get_rank(group))
        if plan.splits_backward and not self._defers:
            for module in self.modules_with_weights(chunks):
                defer_weight_gradients(module, self._weight_gradients.add)
            self._defers = True
        sizes = [segments.layout(edge, 0).num_elements for edge in range(plan.num_segments - 1)]
        agree_on_plan(plan, (*size, sum(sizes)), dtype, group)
        return self._iterations.executor(plan, segments, chunks), segments

    def _per_chunk(self, value: Any, what: str) -> list[Any]:
        """One value per model chunk: a list as it is, or the only one."""
        values = value if isinstance(value, list) else [value]
        expected = self.chunks_per_rank
        if len(values) != expected:
            wanted = f"one {what}" if expected == 1 else f"{expected} {what}s"
            raise ValueError(f"the {self.name} schedule takes {wanted} per rank, not {len(values)}")
        return values


class SegmentForwardBackward(PlannedForwardBackward):
    """A schedule whose segments are cut at attention, like helix; see :class:`SegmentedGPTModel`.

    If the plan splits the backward pass of a micro batch, the linear layers learn to leave their weight
    gradients for W, see :func:`helixpipe.layers.weight_gradient.defer_weight_gradients`; for micro batches
    without W they compute them at once, as ever. With a spread head every rank reads data and returns the
    losses of its own micro batches.
    """

    @property
    def chunks_per_rank(self) -> int:
        """All segments of a rank are in one model."""
        return 1

    def make_segments(
        self, chunks: list[torch.nn.Module], plan: Plan, size: IterationSize, dtype: torch.dtype, rank: int
    ) -> ModelSegments:
        """See :class:`PlannedForwardBackward`."""
        (model,) = chunks
        segmented = _segmented(model)
        return GPTSegments(
            model,
            segmented,
            size.seq_length,
            size.micro_batch_size,
            dtype,
            self._weight_gradients,
            has_loans=bool(plan.loans),
            losses_here=plan.losses_of(rank),
        )

    def modules_with_weights(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """See :class:`PlannedForwardBackward`."""
        (model,) = chunks
        return [model, *_segmented(model).borrowing_modules]


class SlicedSegmentForwardBackward(SegmentForwardBackward):
    """A schedule whose segments are cut at attention and whose micro batches are slices of sequences.

    The forward step is called once for each sequence, the loss function twice, with whole tensors. Losses are
    returned on the rank of a sequence's last slice.
    """

    def make_segments(
        self, chunks: list[torch.nn.Module], plan: Plan, size: IterationSize, dtype: torch.dtype, rank: int
    ) -> ModelSegments:
        """See :class:`PlannedForwardBackward`."""
        (model,) = chunks
        return SlicedGPTSegments(model, _segmented(model), plan, rank, size, dtype, self._weight_gradients)


def _segmented(model: torch.nn.Module) -> SegmentedGPTModel:
    """The segmented model inside of what the training loop knows."""
    found: SegmentedGPTModel = get_attr_wrapped_model(model, "forward_segment", return_model_obj=True)
    return found


class HelixForwardBackward(SegmentForwardBackward):
    """The helix schedule for programs that tell their sizes only when they call, like Megatron-LM's.

    Args:
        num_fold: micro batches per slot.
        attention_range: pieces that the attention rank runs, the range that the model was built for.
        head_placement: where the head and the loss are: on the ``first`` rank, or ``spread`` over all.
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
        options: dict[str, int | str] = {"num_fold": num_fold, "attention_range": attention_range}
        if head_placement != "first":
            options["head_placement"] = head_placement
        super().__init__(PlanOnDemand("helix", options), clock=clock, progress=progress)


class StageForwardBackward(PlannedForwardBackward):
    """A schedule whose segments are stages: Megatron's own GPTModel chunks, run in the plan's order."""

    def make_segments(
        self, chunks: list[torch.nn.Module], plan: Plan, size: IterationSize, dtype: torch.dtype, rank: int
    ) -> ModelSegments:
        """See :class:`PlannedForwardBackward`."""
        return StageSegments(
            chunks, plan, rank, size.seq_length, size.micro_batch_size, dtype, self._weight_gradients
        )


class SliceForwardBackward(PlannedForwardBackward):
    """A schedule of stages whose micro batches are slices of sequences, like Seq1F1B.

    The forward step and the loss function are called once for each sequence, as ever: with whole tensors.
    """

    def make_segments(
        self, chunks: list[torch.nn.Module], plan: Plan, size: IterationSize, dtype: torch.dtype, rank: int
    ) -> ModelSegments:
        """See :class:`PlannedForwardBackward`."""
        (model,) = chunks
        return SliceSegments(model, plan, size, dtype)
