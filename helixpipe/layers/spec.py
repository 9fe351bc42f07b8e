"""Layer specs: Megatron's own modules with our core attention, whole or cut at the attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from copy import deepcopy
from enum import Flag, auto

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from helixpipe.layers.attention import FlashCoreAttention
from helixpipe.layers.norm import TorchNorm
from helixpipe.layers.recomputing_layer import NOTHING_SAVED, MemorySaving, SavingTransformerLayer

LOCAL = "local"
TRANSFORMER_ENGINE = "transformer_engine"


class LayerPart(Flag):
    """The parts of a layer around its core attention."""

    PRE = auto()  # norm1 and QKV
    PROJ = auto()  # and the residual addition
    MLP = auto()  # norm2, mlp and the residual addition
    POST = PROJ | MLP
    WHOLE = PRE | POST


# What an attention segment runs beside the core attention itself, by attention range. QKV takes norm1 along:
# the message in is then the hidden state alone, and no rank keeps both norm1's input and its output.
ATTENTION_PARTS: Mapping[str, LayerPart] = {
    "core": LayerPart(0),
    "qkv": LayerPart.PRE,
    "block": LayerPart.PRE | LayerPart.PROJ,
}


def default_implementation() -> str:
    """Transformer Engine where it is installed, else Megatron's local modules."""
    found = importlib.util.find_spec("transformer_engine") is not None
    return TRANSFORMER_ENGINE if found else LOCAL


def layer_spec(
    config: TransformerConfig,
    implementation: str,
    saving: MemorySaving = NOTHING_SAVED,
) -> ModuleSpec:
    """The spec of one whole transformer layer.

    Args:
        config: decides the norm and query-key norm.
        implementation: ``local`` (our flash attention and norms) or ``transformer_engine``.
        saving: what the layer does to keep less for the backward pass.
    """
    spec = _megatrons_spec(config, implementation)
    if saving.changes_layers:
        spec.module, spec.params = SavingTransformerLayer, {"saving": saving}
    return spec


def _megatrons_spec(config: TransformerConfig, implementation: str) -> ModuleSpec:
    if implementation == TRANSFORMER_ENGINE:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = TorchNorm
    attention = layer.self_attention.submodules
    attention.core_attention = FlashCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = TorchNorm
    return spec


def final_norm(implementation: str) -> type:
    """The class of the norm before the head."""
    if implementation == TRANSFORMER_ENGINE:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return TorchNorm


def block_spec(
    config: TransformerConfig,
    implementation: str,
    vp_stage: int | None = None,
    saving: MemorySaving = NOTHING_SAVED,
) -> TransformerBlockSubmodules:
    """The spec of this rank's layers for Megatron's own GPTModel."""
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config, implementation, saving)] * count,
        layer_norm=final_norm(implementation),
    )


def partial_layer_spec(spec: ModuleSpec, part: LayerPart) -> ModuleSpec:
    """``spec`` with the modules outside ``part`` replaced by identities, which own no parameters."""
    spec = deepcopy(spec)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    if LayerPart.PRE not in part:
        layer.input_layernorm = IdentityOp
        attention.linear_qkv = attention.core_attention = IdentityOp
        attention.q_layernorm = attention.k_layernorm = IdentityOp
    if LayerPart.PROJ not in part:
        attention.linear_proj = IdentityOp
        layer.self_attn_bda = IdentityFuncOp
    if LayerPart.MLP not in part:
        layer.mlp_bda = IdentityFuncOp
        layer.pre_mlp_layernorm = layer.mlp = IdentityOp
    return spec
