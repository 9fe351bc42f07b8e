"""Losses and gradients of a model with and without the options that save memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from models import SEED, Case, initialize, relative_error
from stages import batch_of, run_segments
from torch import Tensor

from helixpipe.layers.initialization import initialize_weights

# Slices that do not divide the sequence, and one of nearly all of it.
SAVINGS: list[dict[str, Any]] = [
    {"without_attention": True},
    {"levels": "products"},
    {"mlp_chunk": 24},
    {"loss_chunk": 126},
    {"without_attention": True, "mlp_chunk": 100, "loss_chunk": 10},
    {"levels": "products", "mlp_chunk": 100, "loss_chunk": 10},
]


def losses_of(model: Any, case: Case) -> Tensor:
    """Per-token losses [b, s] of a segmented model or a GPTModel."""
    batch = batch_of(case)
    if hasattr(model, "forward_segment"):
        return run_segments(model, **batch)[0]
    return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])


def gradients_of(case: Case, build: Callable[..., Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token losses [b, s] and every gradient of a weighted sum of them."""
    model = build(case)
    initialize_weights(model, model.config, SEED)
    model = model.to(case.dtype)
    torch.manual_seed(5)
    tensor_parallel.model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
    losses = losses_of(model, case)
    weights = torch.rand(losses.shape, generator=torch.Generator().manual_seed(6))
    (losses * weights).sum().backward()
    return losses.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> dict[str, float]:
    """Relative errors of the losses and of every gradient, by name."""
    assert set(found[1]) == set(expected[1])
    errors = {name: relative_error(gradient, expected[1][name]) for name, gradient in found[1].items()}
    return {"losses": relative_error(found[0], expected[0]), **errors}


def compare_on_ranks(
    cases: list[Case], builds: list[Callable[..., Any]]
) -> list[tuple[Case, dict[str, float]]]:
    """Errors of each case, model and option, against the model without the option."""
    initialize(cases[0])
    results = []
    for case in cases:
        for build in builds:
            reference = gradients_of(case, build)
            for saving in SAVINGS:
                saved = replace(case, **saving)
                results.append((saved, compare(gradients_of(saved, build), reference)))
    return results
