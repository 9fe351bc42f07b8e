"""What each rank does in the tests of context parallelism."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import exact_attention
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from models import (
    Case,
    build_planned,
    build_reference,
    everywhere,
    gather_gradients,
    initialize,
    planned_schedule,
    relative_error,
    run_iteration,
)

from helixpipe.layers.attention.context_parallel import context_attention, own_pieces
from helixpipe.layers.attention.core import choose, problem_with


def own_tokens(length: int) -> tuple[list[int], list[int]]:
    """This rank's tokens of a sequence, and those that Megatron gives it."""
    group, tokens = dist.group.WORLD, torch.arange(2 * length).view(2, length)
    parallel_state.initialize_model_parallel(context_parallel_size=group.size())
    # Since 0.18 it is to be told.
    known = inspect.signature(get_batch_on_this_cp_rank).parameters
    more = {"is_hybrid_cp": False, "cp_group": group} if "is_hybrid_cp" in known else {}
    theirs = get_batch_on_this_cp_rank({"tokens": tokens.clone()}, **more)["tokens"]
    return own_pieces(tokens, 1, group.size(), group.rank()).tolist(), theirs.tolist()


def attention_errors(shapes: list[tuple[int, int, int, int]], dtype: torch.dtype) -> list[list[float]]:
    """Errors of output and gradients against explicit scores over whole sequences; for each shape.

    Args:
        shapes: sequence length, heads, groups and head size.
        dtype: of query, key and value.
    """
    group, found = dist.group.WORLD, []
    size, rank = group.size(), group.rank()
    for length, heads, groups, width in shapes:
        generator = torch.Generator().manual_seed(length)
        query, grad = (torch.randn(2, heads, length, width, generator=generator, dtype=dtype) for _ in "qg")
        key, value = (torch.randn(2, groups, length, width, generator=generator, dtype=dtype) for _ in "kv")
        scale = width**-0.5
        output, sums = exact_attention.forward(query, key, value, scale, True)
        expected = exact_attention.backward(grad, query, key, value, output, sums, scale, True)
        own = [own_pieces(tensor, 2, size, rank).requires_grad_() for tensor in (query, key, value)]
        backend = choose("auto", problem_with(*own[:2])).backend
        result = context_attention(*own, scale, backend, group)
        result.backward(own_pieces(grad, 2, size, rank))
        pairs = zip((result, *(tensor.grad for tensor in own)), (output, *expected), strict=True)
        found.append([relative_error(ours, own_pieces(whole, 2, size, rank)) for ours, whole in pairs])
    return found


def compare_with_whole_sequences(cases: list[Case]) -> list[dict[str, Any]]:
    """Losses and gradients of each case against Megatron's 1F1B over whole sequences."""
    return [_compare(case) for case in cases]


def _compare(case: Case) -> dict[str, Any]:
    whole = replace(
        case, cp=1, dp=case.cp * case.dp, same_data=True, without_attention=False, schedule="1f1b",
        attention_range="core", head_placement="first", loss_chunk=None, mlp_chunk=None,
    )  # fmt: skip
    _initialize_anew(whole)
    chunks = build_reference(whole)
    losses = everywhere(run_iteration(whole, chunks, get_forward_backward_func()))
    expected = gather_gradients(chunks)
    _initialize_anew(case)
    runs = {"plan": planned_schedule(case)}
    if case.schedule == "1f1b":
        runs["Megatron's function"] = get_forward_backward_func()
    return {name: _errors(case, function, losses, expected) for name, function in runs.items()}


def _errors(
    case: Case, function: Any, losses: list[Any], expected: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """The error of the losses, and the largest one of a gradient."""
    chunks = build_planned(case)
    own = everywhere(run_iteration(case, chunks, function), getattr(function, "plan", None))
    parts = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(parts, group=parallel_state.get_context_parallel_group())
    found = gather_gradients(chunks)
    assert found.keys() == expected.keys()
    of_losses = relative_error(parts, torch.tensor(losses, dtype=torch.float64))
    return of_losses, max(relative_error(found[name], expected[name]) for name in expected)


def _initialize_anew(case: Case) -> None:
    parallel_state.destroy_model_parallel()
    initialize(case)
