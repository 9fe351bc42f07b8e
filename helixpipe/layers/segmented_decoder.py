"""The layers of a segmented GPT that one rank owns, in parts, under Megatron's names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import sharded_state_dict_default

from helixpipe.layers.experts import check_parts, unsupported_experts
from helixpipe.layers.rotary import POSITIONS
from helixpipe.layers.spec import LayerPart, partial_layer_spec, ranges_with_sinks
from helixpipe.layers.variants import cap_logits, scale_logits
from helixpipe.refusals import refuse


class SegmentedDecoder(MegatronModule):
    """The parts of transformer layers that one rank owns, under their global layer numbers.

    Args:
        config: the model's configuration.
        specs: of every whole layer of the model.
        parts: layer number (from 0) -> the parts that are here.
        norm: class of the norm before the head, or None where the head is elsewhere.
    """

    def __init__(
        self,
        config: TransformerConfig,
        specs: Sequence[ModuleSpec],
        parts: dict[int, LayerPart],
        norm: type | None,
    ) -> None:
        super().__init__(config=config)
        # Megatron adds the offset of a contiguous stage to a layer's number; ours is global already.
        offset = get_transformer_layer_offset(config)
        self.layers = torch.nn.ModuleDict(
            {
                str(number): build_module(
                    partial_layer_spec(specs[number], part), config=config, layer_number=number + 1 - offset
                )
                for number, part in sorted(parts.items())
            }
        )
        self.final_layernorm: torch.nn.Module | None = None
        if norm is not None:
            self.final_layernorm = build_norm(config, norm)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[()] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's checkpoint names: layers are stacked along a first axis of length L, or numbered.

        As in Megatron they are numbered where some have experts and others have not.
        """
        assert not sharded_offsets
        asked = metadata or {}
        numbered = bool(
            self.config.moe_layer_freq != 1
            or asked.get("non_homogeneous_layers")
            or asked.get("singleton_local_shards")
        )
        state: dict[str, Any] = {}
        layers: dict[str, Any] = dict(self.layers.items())
        for number, layer in layers.items():
            here = f"{prefix}layers.{number}."
            offsets = [] if numbered else [(0, int(number), self.config.num_layers)]
            layer_state = layer.sharded_state_dict(here, offsets, metadata)
            replace_prefix_for_sharding(layer_state, here, here if numbered else f"{prefix}layers.")
            state.update(layer_state)
        if self.final_layernorm is not None:
            norm_prefix = f"{prefix}final_layernorm."
            group = parallel_state.get_tensor_model_parallel_group()
            state.update(
                sharded_state_dict_default(self.final_layernorm, norm_prefix, (), metadata, tp_group=group)
            )
        return state


def build_norm(config: TransformerConfig, norm: type) -> torch.nn.Module:
    """A norm over the hidden size."""
    found: torch.nn.Module = build_module(
        norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
    )
    return found


def build_head(
    config: TransformerConfig, vocab_size: int, group: dist.ProcessGroup, *, is_tied: bool
) -> ColumnParallelLinear:
    """The layer from hidden states to logits, without a weight of its own where it uses the embedding's."""
    is_like_embedding = getattr(config, "use_mup", False) and not is_tied
    head = ColumnParallelLinear(
        config.hidden_size,
        vocab_size,
        config=config,
        init_method=config.embedding_init_method if is_like_embedding else config.init_method,
        bias=False,
        skip_bias_add=False,
        gather_output=False,
        skip_weight_param_allocation=is_tied,
        tp_group=group,
    )
    scale_logits(head, config)
    cap_logits(head, config)
    return head


def owned_parts(
    num_layers: int, owned_segments: Collection[int], attention_part: LayerPart, per_layer: int = 2
) -> dict[int, LayerPart]:
    """Which part of which layer belongs to the given segments between attention.

    Args:
        num_layers: L.
        owned_segments: those of attention own nothing.
        attention_part: what attention segments hold; it belongs to the segment before.
        per_layer: segments of a layer: one between attention, the others of attention.
    """
    parts: dict[int, LayerPart] = {}
    for segment in owned_segments:
        if segment % per_layer:
            continue
        layer = segment // per_layer
        if layer < num_layers:
            before = LayerPart.PRE | LayerPart.CORE | attention_part
            parts[layer] = parts.get(layer, LayerPart(0)) | before
        if layer > 0:
            parts[layer - 1] = parts.get(layer - 1, LayerPart(0)) | (LayerPart.POST & ~attention_part)
    return parts


def check_supported(
    config: TransformerConfig,
    position_embedding_type: str,
    attention_range: str = "core",
    *,
    has_slices: bool = False,
) -> None:
    """``ValueError`` for options that would be ignored or wrong when a layer runs in segments."""
    if has_slices:
        check_parts(config, "a schedule that cuts sequences")
    with_sinks = ranges_with_sinks(has_slices=has_slices)
    if config.softmax_type == "learnable" and attention_range not in with_sinks:
        raise ValueError(
            f"--softmax-type learnable does not go with --attention-range {attention_range}, which lends no "
            f"sinks; use {' or '.join(with_sinks)}"
        )
    unsupported = {
        **unsupported_experts(config),
        "multi-latent attention": config.multi_latent_attention,
        "multi-token prediction": bool(config.mtp_num_layers),
        "virtual pipeline stages": config.virtual_pipeline_model_parallel_size is not None,
        "Megatron's activation recomputation": config.recompute_granularity is not None,
        "fp8 or fp4": bool(config.fp8 or config.fp4),
        "output-gated attention": config.attention_output_gate,
        "fused QKV rotary positions": config.fused_single_qkv_rope,
        "fp32 residual connections": config.fp32_residual_connection,
        "CPU offloading": config.cpu_offloading,
        "CUDA graphs": config.cuda_graph_impl != "none",
        f"position embedding {position_embedding_type!r}": position_embedding_type not in POSITIONS,
    }
    refuse(unsupported, "the helix schedule does not support {}; leave it out or use 1f1b")
