"""Fused operations of Apex and Transformer Engine, each used where it is installed and works."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from megatron.core.models.common.embeddings import rope_utils

from helixpipe.layers.optional_packages import APEX_ACCUMULATION, TRANSFORMER_ENGINE, why_not_usable


def has_apex_accumulation() -> bool:
    """Whether Megatron's own linear layers can add a weight gradient to ``main_grad`` as they compute it."""
    return not why_not_usable(APEX_ACCUMULATION)


def fuse_weight_gradients(models: Sequence[torch.nn.Module]) -> None:
    """Let Transformer Engine's linear layers do the same, for which they need no Apex.

    Megatron's option for it, ``gradient_accumulation_fusion``, would ask it of the head, too, which is
    Megatron's own. Every weight must have a ``main_grad``, as Megatron's data-parallel wrapper gives it.
    Modules with borrowed weights, which have none, are no submodules of a model.

    The gradient of a forward pass that is marked as the first would replace the sum, and a plan may run its
    backward pass last. Megatron's switch of the cache for fp8, which the mark serves, takes the mark away.
    """
    if why_not_usable(TRANSFORMER_ENGINE):
        return
    from transformer_engine.pytorch import LayerNormLinear, Linear

    for model in models:
        for module in model.modules():
            if isinstance(module, (Linear, LayerNormLinear)):
                module.fuse_wgrad_accumulation = True
                module.disable_parameter_transpose_cache = True


@cache
def can_fuse_rope(dtype: torch.dtype) -> bool:
    """Whether Transformer Engine's fused rotary positions run and give Megatron's values; tried once."""
    fused = rope_utils.fused_apply_rotary_pos_emb
    if fused is None or not torch.cuda.is_available():
        return False
    return rope_trial(torch.device("cuda", torch.cuda.current_device()), dtype)


def rope_trial(device: torch.device, dtype: torch.dtype) -> bool:
    """Rotate a tiny tensor both ways and compare."""
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(5, 2, 3, 16, generator=generator).to(device, dtype)
    angles = torch.rand(5, 1, 1, 16, generator=generator).to(device)
    try:
        with torch.no_grad():
            found = rope_utils.fused_apply_rotary_pos_emb(tensor, angles, interleaved=False)
            expected = rope_utils._apply_rotary_pos_emb_bshd(tensor, angles)
            error = (found.float() - expected.float()).norm() / expected.float().norm()
    # A broken package may raise anything; without it Megatron's own function is used.
    except Exception:
        return False
    return found.shape == expected.shape and float(error) < 0.01
