"""Megatron's own 1F1B and interleaved schedules with layers that keep less, against the same without."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from models import SEED, Case, _wrap, everywhere, gather_gradients, relative_error, run_iteration
from stages import gpt_stage

from helixpipe.layers.attention.aten import AtenCpu
from helixpipe.layers.attention.interface import ForwardResult


def compare_under_megatron(cases: list[Case], virtual_stages: int | None) -> list[dict[str, Any]]:
    """Errors of losses and gradients, and how often a core attention ran on this rank, for each case.

    Args:
        cases: of one layout, with what they do to keep less.
        virtual_stages: model chunks per rank, run interleaved; None for 1F1B.
    """
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(cases[0].tp, cases[0].pp, virtual_stages)
    results = []
    for case in cases:
        plain = replace(case, without_attention=False, mlp_chunk=None, loss_chunk=None)
        expected_losses, expected, _ = _run(plain, virtual_stages)
        losses, found, calls = _run(case, virtual_stages)
        assert set(found) == set(expected)
        errors = {name: relative_error(found[name], gradient) for name, gradient in expected.items()}
        both = (torch.tensor(values, dtype=torch.float64) for values in (losses, expected_losses))
        errors["losses"] = relative_error(*both)
        smallest = min(float(gradient.norm()) for gradient in expected.values())
        results.append({"errors": errors, "calls": calls, "smallest_norm": smallest})
    return results


def _run(case: Case, virtual_stages: int | None) -> tuple[list[Any], dict[str, torch.Tensor], int]:
    tensor_parallel.model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
    torch.manual_seed(5)
    values = {
        "virtual_pipeline_model_parallel_size": virtual_stages,
        "microbatch_group_size_per_vp_stage": case.pp,
        # As Megatron-LM's training sets it: a stage's output has no data once it is sent.
        "deallocate_pipeline_outputs": True,
    }
    models = [gpt_stage(case, stage, **values) for stage in range(virtual_stages or 0) or [None]]
    chunks = _wrap(case, models[0].config, list(models))
    calls: Counter[str] = Counter()
    original = AtenCpu.forward

    def counting(*arguments: Any, **options: Any) -> ForwardResult:
        calls["forward"] += 1
        return original(*arguments, **options)

    AtenCpu.forward = counting
    try:
        losses = everywhere(run_iteration(case, chunks, get_forward_backward_func()))
    finally:
        AtenCpu.forward = original
    return losses, gather_gradients(chunks), calls["forward"]
