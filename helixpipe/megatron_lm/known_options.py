"""What a segmented model knows of Megatron's configuration. Whatever is not here is refused where it is set.

Every release has new options, and one that passes unseen changes numbers in silence. So an option is let
through only after somebody has looked at what it does to layers that run in segments.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.transformer import TransformerConfig

KNOWN = frozenset(
    {
        # Sizes of the model and of its parts; tensor and data parallelism.
        "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size",
        "kv_channels", "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel",
        "expert_tensor_parallel_size", "tensor_parallel_num_weight_shards",
        "expert_tensor_parallel_num_weight_shards",
        # What Megatron's own modules compute, which the segments are made of.
        "add_bias_linear", "add_qkv_bias", "gated_linear_unit", "activation_func",
        "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "qk_layernorm",
        "rotary_interleaved", "softmax_scale", "attention_dropout", "hidden_dropout",
        "init_method", "output_layer_init_method", "init_method_std", "embedding_init_method",
        "embedding_init_method_std", "perform_initialization", "use_cpu_initialization",
        # Precision.
        "params_dtype", "pipeline_dtype", "autocast_dtype", "bf16", "fp16", "attention_softmax_in_fp32",
        "disable_bf16_reduced_precision_matmul",
        # muP: factors of what the embedding and the head give, of scores, and of what weights are drawn from.
        "use_mup", "mup_width_mult", "mup_base_hidden_size", "mup_embedding_mult", "mup_output_mult",
        "mup_base_head_dim", "mup_attn_scale_power",
        # The same numbers, computed otherwise.
        "bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "apply_rope_fusion",
        "persist_layer_norm", "memory_efficient_layer_norm", "gradient_accumulation_fusion",
        "cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "attention_backend", "transformer_impl",
        "async_tensor_model_parallel_allreduce", "clone_scatter_output_in_embedding", "deterministic_mode",
        "cp_comm_type", "hierarchical_context_parallel_sizes",
        # Of stock schedules: their messages, and what their training loop sets for every schedule.
        "batch_p2p_comm", "batch_p2p_sync", "overlap_p2p_comm", "overlap_p2p_comm_warmup_flush",
        "deallocate_pipeline_outputs", "microbatch_group_size_per_vp_stage", "use_ring_exchange_p2p",
        "pipeline_model_parallel_comm_backend", "timers", "barrier_with_L1_time", "calculate_per_token_loss",
        "finalize_model_grads_func", "grad_scale_func", "grad_sync_func", "no_sync_func", "param_sync_func",
        "config_logger_dir", "test_mode", "hetereogenous_dist_checkpoint",
        # Refused by the model itself, in words of its own.
        "multi_latent_attention", "context_parallel_size", "recompute_granularity",
        "recompute_method", "recompute_num_layers", "recompute_modules", "distribute_saved_activations",
        "virtual_pipeline_model_parallel_size", "fp8", "fp4", "cpu_offloading", "mtp_num_layers",
        "cuda_graph_impl", "softmax_type", "window_size", "window_attn_skip_freq",
        "fp32_residual_connection",
    }
)  # fmt: skip

# Options by the beginning of their names, which do nothing unless another one is set, which is checked.
_OF_ANOTHER = {
    "moe_": "num_moe_experts",
    "mtp_": "mtp_num_layers",
    "fp8_": "fp8",
    "fp4_": "fp4",
    "cpu_offloading_": "cpu_offloading",
    "cuda_graph_": "cuda_graph_impl",
    "tp_comm_": "tp_comm_overlap",
    "kitchen_": "use_kitchen",
    "mamba_": "is_hybrid_model",
    "linear_": "experimental_attention_variant",
    "dsa_": "experimental_attention_variant",
    "inference_": "flash_decode",
}


def check_config(config: TransformerConfig, schedule: str) -> None:
    """``ValueError`` for the first option that is set to something else than Megatron's default, and unknown.

    Args:
        config: of the model that is asked for.
        schedule: for the message.
    """
    defaults = {field.name: _default(field) for field in dataclasses.fields(config)}
    for name, default in defaults.items():
        value = getattr(config, name)
        if name in KNOWN or _equal(value, default) or _does_nothing(name, config, defaults):
            continue
        raise ValueError(
            f"--pipeline-schedule {schedule} does not know {name}={value!r} of {type(config).__name__}; "
            "leave out the option that sets it, or use 1f1b"
        )


def _does_nothing(name: str, config: TransformerConfig, defaults: dict[str, Any]) -> bool:
    return any(
        name.startswith(beginning)
        and name != switch
        and getattr(config, switch, None) == defaults.get(switch)
        for beginning, switch in _OF_ANOTHER.items()
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _equal(value: Any, default: Any) -> bool:
    # Not of different types: 0 is a choice where False is the default.
    return value is default or (type(value) is type(default) and bool(value == default))
