"""Rotary positions, plain or by YaRN, that keep nothing for the backward pass."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    YarnRotaryEmbedding,
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, autograd

# The kinds of positions that models of our schedules have.
POSITIONS = ("learned_absolute", "rope", "yarn", "none")
# Of YaRN: arguments of Megatron's class by the attributes of a configuration that its GPTModel reads.
_OF_YARN = {
    "scaling_factor": "yarn_rotary_scaling_factor",
    "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
    "correction_range_round_to_int": "yarn_correction_range_round_to_int",
}


def build_rotary(
    kind: str, config: TransformerConfig, group: dist.ProcessGroup, **options: Any
) -> RotaryEmbedding | None:
    """What gives the angles; None for positions of another kind than ``rope`` and ``yarn``.

    Args:
        kind: one of :data:`POSITIONS`.
        config: tells how channels are paired, and YaRN's numbers.
        group: of context parallelism.
        options: GPTModel's for rotary positions, like ``rotary_base``.
    """
    options = {"rotary_percent": 1.0, **options}
    shared = {
        "kv_channels": config.kv_channels,
        "rotary_interleaved": config.rotary_interleaved,
        "use_cpu_initialization": config.use_cpu_initialization,
        "cp_group": group,
    }
    if kind == "rope":
        return RotaryEmbedding(**shared, **options)
    if kind != "yarn":
        return None
    # GPTModel gives these no other scaling.
    for name in ("rope_scaling", "rope_scaling_factor"):
        options.pop(name, None)
    return YarnRotaryEmbedding(
        **shared, **options, **{name: getattr(config, attribute) for name, attribute in _OF_YARN.items()}
    )


def is_rotated(config: TransformerConfig, layer_number: int) -> bool:
    """Whether queries and keys of a layer have rotary positions, if the model has any.

    Args:
        config: with Megatron's ``no_rope_freq``.
        layer_number: in the whole model, from 1.
    """
    return not (config.no_rope_freq and config.no_rope_freq[layer_number - 1])


def angles_of(rotary: RotaryEmbedding, length: int) -> Tensor:
    """The angles of the first ``length`` positions, [s, 1, 1, rotated part of d]; Megatron keeps them."""
    angles = rotary(length)
    # YaRN's come with the factor that is also in the configuration.
    found: Tensor = angles[0] if isinstance(angles, tuple) else angles
    return found


class _Rotate(autograd.Function):
    """A rotation's transpose is the rotation back, so angles are all that its backward pass needs.

    Megatron's unfused function leaves the sines and cosines of all positions, [s, d] each, with every query
    and every key. For h = 4096, d = 128 and tp 8 with sequence parallelism these four are as large as the
    residual. The angles are Megatron's cached ones, or those of joined documents: one tensor for all layers.
    """

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, angles: Tensor, config: TransformerConfig, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.angles, ctx.config, ctx.group = angles, config, group
        return rotated(tensor, angles, config, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return rotated(grad, -ctx.angles, ctx.config, ctx.group), None, None, None


def rotated(tensor: Tensor, angles: Tensor, config: TransformerConfig, group: dist.ProcessGroup) -> Tensor:
    """Megatron's function as its attention calls it; autograd keeps what it likes."""
    # YaRN also multiplies by a factor, 1 for all others.
    factor = _yarn_get_concentration_factor_from_config(config)
    output: Tensor = apply_rotary_pos_emb(tensor, angles, config=config, mscale=factor, cp_group=group)
    return output


def rotate(tensor: Tensor, angles: Tensor, config: TransformerConfig, group: dist.ProcessGroup) -> Tensor:
    """Megatron's ``apply_rotary_pos_emb``.

    Args:
        tensor: [s, b, heads, d].
        angles: [s, 1, 1, rotated part of d], the same tensor for every layer.
        config: tells how channels are paired.
        group: of context parallelism.

    Returns:
        Like ``tensor``.
    """
    output: Tensor = _Rotate.apply(tensor, angles, config, group)
    return output
