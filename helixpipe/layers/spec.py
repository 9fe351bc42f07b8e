"""Layer specs: Megatron's own modules with our core attention, whole or cut at the attention."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from enum import Flag, auto
from functools import partial

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from helixpipe.layers.attention.choice import AUTO, UNFUSED
from helixpipe.layers.attention.core import FlashCoreAttention
from helixpipe.layers.experts import add_biases, has_experts, prepare_routers
from helixpipe.layers.norm import TorchNorm
from helixpipe.layers.optional_packages import TRANSFORMER_ENGINE as ENGINE_PACKAGE
from helixpipe.layers.optional_packages import why_not_usable
from helixpipe.layers.recomputing_layer import NOTHING_SAVED, MemorySaving, SavingTransformerLayer
from helixpipe.layers.variants import add_sandwich_norms, check_local, variants_of


@dataclass(frozen=True)
class Implementation:
    """What computes the layers of a model.

    Attributes:
        modules: ``local``, Megatron's own linear layers with our norms, or ``transformer_engine``.
        attention: name of an attention backend, or ``auto``: the fastest that works.
        documents: attention ends at the documents of which sequences are joined.
    """

    modules: str
    attention: str = AUTO
    documents: bool = False


LOCAL = Implementation("local")
TRANSFORMER_ENGINE = Implementation("transformer_engine")


class LayerPart(Flag):
    """The parts of a layer around its core attention."""

    PRE = auto()  # norm1 and QKV
    CORE = auto()  # the core attention, for its sinks where these are learned
    PROJ = auto()  # and the residual addition
    MLP = auto()  # norm2, mlp and the residual addition
    POST = PROJ | MLP
    WHOLE = PRE | CORE | POST


# What an attention segment runs beside the core attention itself, by attention range. QKV takes norm1 along:
# the message in is then the hidden state alone, and no rank keeps both norm1's input and its output.
ATTENTION_PARTS: Mapping[str, LayerPart] = {
    "core": LayerPart(0),
    "qkv": LayerPart.PRE | LayerPart.CORE,
    "block": LayerPart.PRE | LayerPart.CORE | LayerPart.PROJ,
}


def ranges_with_sinks(*, has_slices: bool) -> tuple[str, ...]:
    """Attention ranges that lend learned sinks: with QKV; over slices, whose QKV comes before, with proj."""
    return ("block",) if has_slices else ("qkv", "block")


def default_implementation() -> Implementation:
    """Transformer Engine where it is installed and can be imported, else Megatron's local modules."""
    return LOCAL if why_not_usable(ENGINE_PACKAGE) else TRANSFORMER_ENGINE


def check_implementation(implementation: Implementation) -> None:
    """``ValueError`` for Transformer Engine where it cannot be used."""
    reason = why_not_usable(ENGINE_PACKAGE)
    if implementation.modules == TRANSFORMER_ENGINE.modules and reason:
        raise ValueError(
            f"--transformer-impl {implementation.modules} cannot be used: {ENGINE_PACKAGE} {reason}; "
            f"repair it, or use --transformer-impl {LOCAL.modules}"
        )


def layer_spec(
    config: TransformerConfig,
    implementation: Implementation,
    saving: MemorySaving = NOTHING_SAVED,
    layer: int = 0,
) -> ModuleSpec:
    """The spec of one whole transformer layer.

    Args:
        config: decides the norm, query-key norm, which layers have experts, and whether our core
            attention can do what is asked for.
        implementation: whose modules, and which attention.
        saving: what layers do to keep less for the backward pass.
        layer: its number in the whole model, from 0: each may have, or keep, something else.

    Raises:
        ValueError: Transformer Engine where it cannot be used, or an attention backend that cannot do what
            the configuration asks for.
    """
    spec = _megatrons_spec(config, implementation, has_experts(config, layer))
    if variants_of(config).sandwich_norm:
        add_sandwich_norms(spec)
    if holds_scores(config, implementation):
        # Of Transformer Engine's modules, too, which differ from it by rounding.
        spec.submodules.self_attention.submodules.core_attention = DotProductAttention
    elif not leaves_attention_to_engine(config, implementation):
        spec.submodules.self_attention.submodules.core_attention = partial(
            FlashCoreAttention, backend=implementation.attention, documents=implementation.documents
        )
    if saving.changes_layer(layer):
        spec.module = SavingTransformerLayer
        spec.params = {"level": saving.level(layer), "mlp_chunk_size": saving.mlp_chunk_size}
    return spec


def _megatrons_spec(config: TransformerConfig, implementation: Implementation, is_moe: bool) -> ModuleSpec:
    num_experts = config.num_moe_experts if is_moe else None
    if is_moe:
        prepare_routers()
    if implementation.modules == TRANSFORMER_ENGINE.modules:
        check_implementation(implementation)
        check_local(config)
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts,
            moe_grouped_gemm=is_moe and config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    if config.moe_grouped_gemm:
        raise ValueError(
            "--moe-grouped-gemm needs Transformer Engine's layers, and Megatron's own are used here; leave "
            "it out, or use --transformer-impl transformer_engine"
        )
    spec = get_gpt_layer_local_spec(
        num_experts=num_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    layer = spec.submodules
    if is_moe:
        # A checkpoint has norm2 under its own name, as Transformer Engine's modules have it before experts.
        del layer.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        if config.add_bias_linear:
            add_biases(spec)
    layer.input_layernorm = layer.pre_mlp_layernorm = TorchNorm
    attention = layer.self_attention.submodules
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = TorchNorm
    return spec


def leaves_attention_to_engine(config: TransformerConfig, implementation: Implementation) -> bool:
    """Whether Transformer Engine's own attention module runs: for what no backend of ours has.

    Raises:
        ValueError: such a thing, and a backend that was named, a cap of scores, or documents at which
            attention ends.
    """
    if implementation.modules != TRANSFORMER_ENGINE.modules or holds_scores(config, implementation):
        return False
    is_capped = bool(variants_of(config).attention_softcap)
    is_open = implementation.attention == AUTO and not is_capped and config.softmax_type == "vanilla"
    only_there = {
        "attention dropout": bool(config.attention_dropout),
        # A backend that is named computes windows in blocks, and so it is with caps and sinks.
        "sliding windows": config.window_size is not None and is_open,
    }
    asked_for = [name for name, is_set in only_there.items() if is_set]
    if asked_for and implementation.attention != AUTO:
        raise ValueError(
            f"--attention-backend {implementation.attention} does not have {asked_for[0]}; leave one out"
        )
    if asked_for and is_capped:
        raise ValueError(f"--attn-logit-softcapping does not go with {asked_for[0]}; leave one out")
    if asked_for and implementation.documents:
        raise ValueError(f"--reset-attention-mask does not go with {asked_for[0]}; leave one out")
    return bool(asked_for)


def holds_scores(config: TransformerConfig, implementation: Implementation) -> bool:
    """Whether Megatron's own attention runs, which holds a score for each pair of tokens.

    It is asked for by name, or the only one that has dropout where Transformer Engine is not used.

    Raises:
        ValueError: so it does, and attention is to end at documents or to cap scores.
    """
    is_local = implementation.modules != TRANSFORMER_ENGINE.modules
    needs_it = is_local and implementation.attention == AUTO and bool(config.attention_dropout)
    holds = needs_it or implementation.attention in UNFUSED
    if holds and variants_of(config).attention_softcap:
        raise ValueError(
            "Megatron's own attention does not cap scores; use --attention-dropout 0 and leave "
            "--attention-backend unfused out, or leave --attn-logit-softcapping out"
        )
    if holds and implementation.documents:
        raise ValueError(
            "--reset-attention-mask needs a flash attention backend; use --attention-dropout 0 and leave "
            "--attention-backend unfused out"
        )
    return holds


def final_norm(implementation: Implementation) -> type:
    """The class of the norm before the head."""
    if implementation.modules == TRANSFORMER_ENGINE.modules:
        from megatron.core.extensions.transformer_engine import TENorm

        found: type = TENorm
        return found
    return TorchNorm


def block_spec(
    config: TransformerConfig,
    implementation: Implementation,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    saving: MemorySaving = NOTHING_SAVED,
) -> TransformerBlockSubmodules:
    """The spec of this rank's layers for Megatron's own GPTModel."""
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(config, implementation, saving, layer) for layer in range(first, first + count)
        ],
        layer_norm=final_norm(implementation),
    )


def partial_layer_spec(spec: ModuleSpec, part: LayerPart) -> ModuleSpec:
    """``spec`` with the modules outside ``part`` replaced by identities, which own no parameters."""
    spec = deepcopy(spec)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    if LayerPart.PRE not in part:
        layer.input_layernorm = IdentityOp
        attention.linear_qkv = IdentityOp
        attention.q_layernorm = attention.k_layernorm = IdentityOp
    if LayerPart.CORE not in part:
        attention.core_attention = IdentityOp
    if LayerPart.PROJ not in part:
        attention.linear_proj = IdentityOp
        layer.self_attn_bda = IdentityFuncOp
    if LayerPart.MLP not in part:
        layer.mlp_bda = IdentityFuncOp
        layer.pre_mlp_layernorm = layer.mlp = IdentityOp
    return spec
