"""A program for tests: models of Transformer Engine's modules against Megatron's local ones.

It runs as a process of its own, because megatron.core finds Transformer Engine, here its stand-in, when it is
imported: ``python engine_worker.py FUNCTION`` with the stand-in on ``PYTHONPATH``, one JSON object out.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from models import (
    Case,
    build_planned,
    build_reference,
    gather_gradients,
    initialize,
    planned_schedule,
    relative_error,
    run_iteration,
)
from pretend import pretend_rank
from ranks import run_on_ranks

from helixpipe.layers import fusions
from helixpipe.layers.initialization import canonical_parameters
from helixpipe.layers.spec import TRANSFORMER_ENGINE, default_implementation
from megatron.pretrain.model import unwrap

CASES = [
    Case(pp=2, style="llama", schedule="1f1b"),
    Case(pp=2, schedule="gpipe"),
    *(Case(pp=2, style="llama", attention_range=name) for name in ("core", "qkv", "block")),
    Case(pp=2, attention_range="block", head_placement="spread", tied=False),
    Case(pp=2, style="llama", attention_range="qkv", without_attention=True),
]


def schedules() -> dict[str, Any]:
    """Worst error of a gradient by case, over two ranks."""
    return run_on_ranks(2, compare, CASES)[0]


def single() -> dict[str, Any]:
    """The same on one rank, with every fusion; what is imported, and whether rotary positions are fused."""
    case = Case(pp=1, style="llama", attention_range="block", num_layers=2)
    with pretend_rank(case):
        found = compare([case])
        from transformer_engine.pytorch.attention import rope as engine_rope
        from transformer_engine.pytorch.module import fused

        used = len(fused), len(engine_rope.calls)
        rope = fusions.rope_trial(torch.device("cpu"), torch.float32)
    return {
        **found,
        "default": default_implementation() == TRANSFORMER_ENGINE,
        "rope": rope,
        "used": used,
        "attention": attention_modules(),
    }


def attention_modules() -> list[str]:
    """Classes of core attention in layers without and with what only Transformer Engine's own has."""
    found = []
    for values in ({}, {"window_size": (8, 0)}, {"attention_dropout": 0.1}):
        case = Case(pp=1, modules=TRANSFORMER_ENGINE.modules, num_layers=1, schedule="1f1b")
        with pretend_rank(case):
            (chunk,) = build_reference(case, **values)
            layer = unwrap(chunk).decoder.layers[0]
            found.append(type(layer.self_attention.core_attention).__name__)
    return found


def compare(cases: list[Case]) -> dict[str, float]:
    """Worst relative error of any gradient of Transformer Engine's model, plain and with its fusions."""
    initialize(cases[0])
    found = {}
    for case in cases:
        expected, weights = _gradients(case, {})
        for fused in (False, True):
            engine = replace(case, modules=TRANSFORMER_ENGINE.modules)
            gradients, _ = _gradients(engine, weights, fused=fused)
            assert gradients.keys() == expected.keys()
            errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
            found[f"{case}{' fused' if fused else ''}"] = max(errors.values())
    return found


def _gradients(
    case: Case, weights: dict[str, torch.Tensor], *, fused: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of the whole pipeline and this rank's weights, by Megatron's local names."""
    chunks = build_planned(case)
    models = [unwrap(chunk) for chunk in chunks]
    for model in models:
        for name, parameter in canonical_parameters(model):
            if weights:
                parameter.data.copy_(weights[_local(name)])
        model.config.apply_rope_fusion = fused
    kinds = {type(module).__name__ for model in models for module in model.modules()}
    assert ("TERowParallelLinear" in kinds) == (case.modules == TRANSFORMER_ENGINE.modules)
    if fused:
        fusions.fuse_weight_gradients(models)
    run_iteration(case, chunks, _schedule(case))
    here = {
        _local(name): parameter.detach().clone()
        for model in models
        for name, parameter in canonical_parameters(model)
    }
    return {_local(name): grad for name, grad in gather_gradients(chunks).items()}, here


def _schedule(case: Case) -> Any:
    if case.schedule == "1f1b":
        from megatron.core.pipeline_parallel import get_forward_backward_func

        return get_forward_backward_func()
    return planned_schedule(case)


def _local(name: str) -> str:
    """A parameter's name in a local layer, where norms are modules of their own."""
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


if __name__ == "__main__":
    print(json.dumps({"schedules": schedules, "single": single}[sys.argv[1]]()))
