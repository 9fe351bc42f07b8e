"""What each rank does in the equivalence tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from models import (
    Case,
    build_optimizer,
    build_planned,
    build_reference,
    everywhere,
    gather_gradients,
    initialize,
    planned_schedule,
    relative_error,
    run_iteration,
)

from helixpipe.runtime.weight_gradients import DeferredWeightGradients


def compare_one_iteration(cases: list[Case], tamper: bool = False) -> list[dict[str, Any]]:
    """Losses and gradient errors of a plan against Megatron's own schedule function, for each case.

    With ``tamper``, the plan's run gets one wrong label.
    """
    return [_compare(case, tamper) for case in cases]


def _reference_of(case: Case) -> Case:
    """What Megatron's own run depends on: cases that differ elsewhere share it."""
    return replace(
        case,
        schedule="helix",
        split="none",
        interlocked=False,
        extra=case.num_microbatches,
        fold=1,
        rounds=0,
        overlap=False,
        attention_range="core",
        head_placement="first",
        without_attention=False,
        levels="none",
        mlp_chunk=None,
        loss_chunk=None,
        num_slices=1,
        resend_context=False,
    )


@cache
def _run_reference(case: Case) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses and gradients of Megatron's own schedule function.

    Megatron cuts layers evenly: where ranks have different numbers of them, each runs the whole model.
    """
    whole = case.num_layers % case.pp != 0
    reference = build_reference(case, whole=whole)
    function = forward_backward_no_pipelining if whole else get_forward_backward_func()
    losses = everywhere(run_iteration(case, reference, function))
    return losses, gather_gradients(reference)


def _compare(case: Case, tamper: bool) -> dict[str, Any]:
    initialize(case)
    reference_losses, expected = _run_reference(_reference_of(case))
    planned = build_planned(case)
    schedule = planned_schedule(case)
    with counting_deferred() as deferred:
        own = run_iteration(case, planned, schedule, tamper=tamper)
    losses = everywhere(own, schedule.plan)
    found = gather_gradients(planned)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    assert schedule.plan is not None
    return {
        "case": str(case),
        "losses": losses,
        "reference_losses": reference_losses,
        "missing": sorted(set(expected) ^ set(found)),
        "smallest_norm": min(float(grad.norm()) for grad in expected.values()),
        "errors": {name: relative_error(found[name], expected[name]) for name in expected if name in found},
        "deferred": deferred[0],
        "trace_is_plan": tuple(schedule.trace.operations) == schedule.plan.orders[rank],
    }


def compare_with_fp32(case: Case) -> tuple[float, float]:
    """Errors of all gradients of a plan, and of Megatron's function, against Megatron's in fp32."""
    initialize(case)
    _, truth = _run_reference(replace(_reference_of(case), dtype=torch.float32))
    _, megatrons = _run_reference(_reference_of(case))
    planned = build_planned(case)
    run_iteration(case, planned, planned_schedule(case))
    names = sorted(truth)

    def joined(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([(gradients[name].float() / truth[name].norm()).flatten() for name in names])

    exact = joined(truth)
    return tuple(relative_error(joined(of), exact) for of in (gather_gradients(planned), megatrons))


@contextmanager
def counting_deferred() -> Iterator[list[int]]:
    """How many weight gradients were left for a W."""
    count, add = [0], DeferredWeightGradients.add

    def counted(self: DeferredWeightGradients, work: Any) -> None:
        count[0] += self._open is not None
        add(self, work)

    with mock.patch.object(DeferredWeightGradients, "add", counted):
        yield count


def compare_training(case: Case, steps: int) -> dict[str, Any]:
    """Losses and gradient norms of ``steps`` training steps under both."""
    initialize(case)
    result = {}
    for name, build, schedule in (
        ("reference", build_reference, get_forward_backward_func()),
        ("planned", build_planned, planned_schedule(case)),
    ):
        chunks = build(case)
        optimizer = build_optimizer(case, chunks)
        history = []
        for step in range(steps):
            optimizer.zero_grad()
            losses = everywhere(run_iteration(case, chunks, schedule, step), getattr(schedule, "plan", None))
            _, norm, _ = optimizer.step()
            history.append((losses, float(norm)))
        own = run_iteration(case, chunks, schedule, steps, forward_only=True)
        evaluation = everywhere(own, getattr(schedule, "plan", None))
        result[name] = (history, evaluation)
    return result
