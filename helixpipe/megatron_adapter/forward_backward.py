"""Megatron's ``forward_backward_func``, carried out by a helix plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from helixpipe.layers.segmented_gpt import SegmentedGPTModel
from helixpipe.megatron_adapter.forward_step import GPTSegments, IterationInput
from helixpipe.plan import Kind, Operation, Plan, ScheduleRequest, build_plan
from helixpipe.runtime.communicator import TorchCommunicator
from helixpipe.runtime.executor import Executor
from helixpipe.runtime.trace import Clock, Trace, default_clock


class _Size(NamedTuple):
    """What an executor is built for."""

    num_microbatches: int
    seq_length: int
    micro_batch_size: int
    forward_only: bool


class HelixForwardBackward:
    """A ``forward_backward_func`` with Megatron's signature and return value.

    The loss is computed where the last segment is (pipeline rank 0), so the list of loss dictionaries is
    returned there and is empty on the other ranks.

    Args:
        num_fold: micro batches per slot.
        attention_range: only ``core`` is executed; the other ranges are planned.
        clock: times the trace; chosen by the device if None.

    Attributes:
        trace: what the last iteration ran on this rank.
        plan: the plan of the last iteration.

    Raises:
        ValueError: an attention range that cannot be executed.
    """

    def __init__(
        self, *, num_fold: int = 2, attention_range: str = "core", clock: Clock | None = None
    ) -> None:
        if attention_range != "core":
            raise ValueError(
                f"attention range {attention_range!r} can be planned but not executed; "
                "use --attention-range core"
            )
        self.num_fold = num_fold
        self.attention_range = attention_range
        self.trace = Trace(clock or default_clock())
        self.plan: Plan | None = None
        self._executors: dict[_Size, tuple[Executor, GPTSegments]] = {}
        self._communicator: TorchCommunicator | None = None

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
                raise ValueError(f"the helix schedule does not support {name}")
        chunk = _only(model, "model chunk")
        size = _Size(num_microbatches, seq_length, micro_batch_size, forward_only)
        if size not in self._executors:
            self._executors[size] = self._build(chunk, size)
        executor, segments = self._executors[size]
        self.plan = executor.plan
        segments.begin(
            IterationInput(
                forward_step_func,
                _only(data_iterator, "data iterator"),
                num_microbatches,
                collect_non_loss_data,
                differentiate=not forward_only,
            )
        )
        executor.run()
        if not forward_only:
            self._finalize(chunk, segments, bool(force_all_reduce))
        return segments.result.loss_data

    def _build(self, model: torch.nn.Module, size: _Size) -> tuple[Executor, GPTSegments]:
        config = get_model_config(model)
        plan = build_plan(
            "helix",
            ScheduleRequest(
                num_layers=config.num_layers,
                num_ranks=parallel_state.get_pipeline_model_parallel_world_size(),
                num_microbatches=size.num_microbatches,
                num_fold=self.num_fold,
                attention_range=self.attention_range,
            ),
        )
        if size.forward_only:
            plan = plan.forward_only()
        segmented: SegmentedGPTModel = get_attr_wrapped_model(model, "forward_segment", return_model_obj=True)
        dtype = config.pipeline_dtype or config.params_dtype
        segments = GPTSegments(model, segmented, size.seq_length, size.micro_batch_size, dtype)
        group = parallel_state.get_pipeline_model_parallel_group()
        agree_on_plan(plan, size, dtype, group)
        if self._communicator is None:
            self._communicator = _communicator(group)
        executor = Executor(
            plan,
            segments,
            self._communicator,
            device=next(model.parameters()).device,
            trace=self.trace,
            backward_context=_hold_gradient_reduction(model, segmented, plan, self._communicator.rank),
        )
        return executor, segments

    def _finalize(self, model: torch.nn.Module, segments: GPTSegments, force_all_reduce: bool) -> None:
        """Reduce gradients over data-parallel ranks through Megatron's own function."""
        config = get_model_config(model)
        if config.no_sync_func is not None and _is_tied(segments.segmented):
            model.start_grad_sync()  # type: ignore[operator]
        if config.finalize_model_grads_func is None:
            return
        num_tokens = None
        if config.calculate_per_token_loss:
            # Megatron takes the count from the last pipeline rank; here it is known on the first.
            num_tokens = segments.result.num_tokens
            if num_tokens is None:
                num_tokens = torch.zeros((), dtype=torch.int, device=next(model.parameters()).device)
            dist.all_reduce(num_tokens, group=parallel_state.get_pipeline_model_parallel_group())
        config.finalize_model_grads_func([model], num_tokens, force_all_reduce=force_all_reduce)


def agree_on_plan(plan: Plan, size: tuple[Any, ...], dtype: torch.dtype, group: dist.ProcessGroup) -> None:
    """Compare plan and message sizes over the pipeline ranks before the first message.

    Raises:
        ValueError: on every rank if one differs; gloo would deliver garbage without an error.
    """
    mine = (plan.fingerprint[:16], str(dtype), *size)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    if len(set(everyone)) > 1:
        shown = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(everyone))
        raise ValueError(
            "pipeline ranks disagree on (plan, dtype, micro batches, sequence length, micro batch size, "
            f"forward only): {shown}. Start every rank with the same arguments"
        )


def _communicator(group: dist.ProcessGroup) -> TorchCommunicator:
    reverse = None
    if dist.get_backend(group) == "nccl":
        ranks = dist.get_process_group_ranks(group)
        reverse = dist.new_group(ranks, backend="nccl", use_local_synchronization=True)
    return TorchCommunicator(group, reverse)


def _is_tied(segmented: SegmentedGPTModel) -> bool:
    return segmented.share_embeddings_and_output_weights and segmented.pre_process


def _hold_gradient_reduction(
    model: torch.nn.Module, segmented: SegmentedGPTModel, plan: Plan, rank: int
) -> Callable[[Operation], AbstractContextManager[object]]:
    """Keep Megatron from reducing a gradient before its last micro batch has added to it.

    A segment's weights are complete after its last B. A tied embedding is touched by two segments, which
    Megatron's per-parameter count does not know: then everything is reduced after the iteration.
    """
    hold = get_model_config(model).no_sync_func
    if hold is None:
        return lambda operation: nullcontext()
    final: dict[int, Operation] = {}
    if not _is_tied(segmented):
        final = {op.segment: op for op in plan.orders[rank] if op.kind is Kind.B}
    return lambda operation: nullcontext() if final.get(operation.segment) == operation else hold()


def _only(value: Any, what: str) -> Any:
    """The single element of a list, or the value itself."""
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise ValueError(f"the helix schedule takes one {what} per rank, not {len(value)}")
    return value[0]
