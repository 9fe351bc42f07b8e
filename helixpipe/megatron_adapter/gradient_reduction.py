"""When Megatron reduces gradients over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from helixpipe.megatron_adapter.segments.contract import ModelSegments
from helixpipe.plan import Kind, Operation, Plan


def finalize(chunks: list[torch.nn.Module], segments: ModelSegments, force_all_reduce: bool) -> None:
    """Reduce gradients over data-parallel ranks through Megatron's own function."""
    config = get_model_config(chunks[0])
    if config.no_sync_func is not None and segments.has_shared_weights:
        for chunk in chunks:
            chunk.start_grad_sync()  # type: ignore[operator]
    if config.finalize_model_grads_func is None:
        return
    num_tokens = None
    if config.calculate_per_token_loss:
        # Megatron takes the count from the last pipeline rank; here it is known where the loss is.
        device, num_tokens = next(chunks[0].parameters()).device, segments.result.num_tokens
        if num_tokens is None:
            num_tokens = torch.zeros((), dtype=torch.int, device=device)
        num_tokens = num_tokens.to(device, non_blocking=True)
        dist.all_reduce(num_tokens, group=parallel_state.get_pipeline_model_parallel_group())
    config.finalize_model_grads_func(chunks, num_tokens, force_all_reduce=force_all_reduce)


def hold_gradient_reduction(
    chunks: Sequence[torch.nn.Module], segments: ModelSegments, plan: Plan, rank: int
) -> Callable[[Operation], AbstractContextManager[object]]:
    """Keep Megatron from reducing a gradient before its last micro batch has added to it.

    A segment's weights are complete after its last B, or its last B and its last W: both are let through,
    since norms get their gradient from the one and linear layers from the other. A weight that is used by two
    segments defeats Megatron's count per parameter, one on loan is complete only when its gradient has come
    back, and where only some micro batches have W a B may follow the last W: then everything is reduced after
    the iteration.
    """
    hold = get_model_config(chunks[0]).no_sync_func
    if hold is None:
        return lambda operation: nullcontext()
    holds: list[Callable[[], AbstractContextManager[object]]]
    holds = hold if isinstance(hold, list) else [hold]
    assert len(holds) == len(chunks)
    final: dict[tuple[int, Kind], Operation] = {}
    is_mixed = 0 < len(plan.split_micro_batches) < plan.num_microbatches
    if not segments.has_shared_weights and not is_mixed:
        final = {(op.segment, op.kind): op for op in plan.orders[rank] if op.kind in (Kind.B, Kind.W)}

    def context(operation: Operation) -> AbstractContextManager[object]:
        if final.get((operation.segment, operation.kind)) == operation:
            return nullcontext()
        return holds[segments.chunk_of(operation.segment)]()

    return context
