"""What a job and the checkpoint that it goes on from must have in common.

Every option is compared unless the table below says that it changes nothing that is learned, so that an
option added later is compared from its first day. What differs is refused, unless ``--allow-changed`` names
it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from helixpipe.commands.parser import flag_of
from helixpipe.data.corpus_record import known_corpus
from helixpipe.data.prefix import DatasetInfo
from helixpipe.reliability.exit_codes import DataError
from megatron.pretrain.data.blend import samples_of_parts
from megatron.pretrain.data.mock import mock_content
from megatron.pretrain.settings.job import DataSettings, JobSettings, TrainingSettings, cache_folder
from megatron.pretrain.settings.parser import build_parser

# The same losses within rounding, or none at all.
CHANGES_NOTHING = frozenset((
    # Who computes what, when and from which memory.
    "pipeline_schedule", "plan", "hardware", "memory_limit_gib", "num_fold", "num_slices", "attention_range",
    "head_placement", "round_order", "split_weight_gradients", "resend_context",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
    "context_parallel_size", "expert_tensor_parallel_size", "moe_grouped_gemm", "moe_token_dispatcher_type",
    "num_layers_per_virtual_pipeline_stage", "microbatch_group_size_per_virtual_pipeline_stage",
    "sequence_parallel", "overlap_grad_reduce",
    "overlap_param_gather", "recompute_granularity", "recompute_method", "recompute_num_layers",
    "recompute_modules", "recompute_without_attention", "recompute_levels", "mlp_chunk_size",
    "loss_chunk_size", "transformer_impl", "attention_backend", "elastic_costs", "num_workers",
    # What watches the job.
    "distributed_timeout_minutes", "hang_timeout_s", "check_gradients_every", "check_layers_every",
    "eval_interval", "eval_iters", "exit_interval", "exit_duration_in_mins", "manual_gc",
    "cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "gradient_accumulation_fusion",
    "deterministic_mode", "log_params_norm", "log_num_zeros_in_grad",
    "log_throughput", "tensorboard_dir", "tensorboard_queue_size", "tensorboard_log_interval",
    "log_timers_to_tensorboard", "log_validation_ppl_to_tensorboard", "log_memory_to_tensorboard",
    "log_world_size_to_tensorboard", "log_loss_scale_to_tensorboard", "wandb_project", "wandb_exp_name",
    "wandb_entity", "wandb_save_dir", "record_memory_history", "memory_snapshot_path",
    "manual_gc_interval", "manual_gc_eval", "empty_unused_memory_level",
    # Where files are; what is in the data is compared by itself.
    "data_path", "data_args_path", "train_data_path", "valid_data_path", "per_split_data_args_path",
    "mock_data", "mmap_bin_files", "tokenizer_type", "tokenizer_model", "vocab_file",
    "merge_file", "vocab_size",
    "tiktoken_pattern", "tiktoken_num_special_tokens", "data_cache_path", "log_interval",
    "metrics_jsonl", "trace_dir", "failure_dir", "save",
    "save_interval", "keep_checkpoints", "set_aside_checkpoints", "async_save", "on_save_failure",
    "load", "load_fallback", "finetune", "no_load_optim", "pretrained_checkpoint", "allow_changed",
    "profile", "profile_step_start",
    "profile_step_end", "profile_ranks",
    # What is compared under another name: --num-query-groups, the padded size of the vocabulary,
    # --train-iters.
    "group_query_attention", "make_vocab_size_divisible_by", "train_samples",
))  # fmt: skip

# What the outputs of a model with given weights depend on. Positions that are learned have a shape, and the
# longest sequence may change otherwise.
MODEL = frozenset((
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "normalization", "norm_epsilon", "swiglu", "openai_gelu", "qk_layernorm",
    "add_bias_linear", "add_qkv_bias", "untie_embeddings_and_output_weights", "position_embedding_type",
    "rotary_base", "rotary_percent", "rotary_seq_len_interpolation_factor", "use_rope_scaling",
    "rope_scaling_factor", "padded_vocab_size", "window_size", "window_attn_skip_freq",
    "rotary_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "geglu", "apply_layernorm_1p", "sandwich_norm", "scale_embedding", "softmax_scale",
    "rotary_base_local", "attn_logit_softcapping", "final_logit_softcapping",
    "num_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "moe_router_topk", "moe_router_score_function",
    "moe_router_pre_softmax", "moe_router_topk_scaling_factor", "moe_router_num_groups",
    "moe_router_group_topk", "moe_expert_capacity_factor", "moe_token_drop_policy",
    "softmax_type", "no_rope_freq", "quick_geglu", "glu_linear_offset", "activation_func_clamp_value",
))  # fmt: skip

# What the form of weights and of optimizer states depends on: no option makes one fit the other.
_FIXED = frozenset((
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "normalization", "swiglu", "geglu", "quick_geglu", "softmax_type", "position_embedding_type",
    "untie_embeddings_and_output_weights",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "padded_vocab_size", "use_distributed_optimizer",
    "bf16", "fp16", "optimizer", "num_experts", "moe_layer_freq", "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
))  # fmt: skip

# With another one of these, the position that was reached is one in another order of samples.
_ORDERS_SAMPLES = frozenset(("seed", "seq_length", "max_seq_length", "split", "data", "samples"))

# What is not an option by itself, by the option that changes it.
_OPTION_OF = {"data": "data_path", "samples": "pipeline_schedule"}

# Compared only where both jobs depend on them.
_CONDITIONAL = frozenset(("max_position_embeddings", "micro_batch_size"))


class Change(NamedTuple):
    """A setting that differs from the checkpoint's, on purpose.

    Attributes:
        text: for the log.
        reorders: whether samples come in another order, in which this job begins anew.
    """

    text: str
    reorders: bool


def settings_of(settings: JobSettings) -> dict[str, Any]:
    """What a checkpoint says of the job that saved it: plain values by name."""
    options = settings.options
    found = {name: options[name] for name in sorted(options.keys() - CHANGES_NOTHING)}
    if options["position_embedding_type"] != "learned_absolute":
        # Nothing is learned for a position: the longest sequence may change.
        del found["max_position_embeddings"]
    if not options["eod_mask_loss"] or options["calculate_per_token_loss"]:
        # All micro batches weigh the same.
        del found["micro_batch_size"]
    found["samples"] = "packed" if settings.schedule.execution.joins_documents else "documents"
    found["data"] = _content(settings.data, settings.training)[:16]
    return found


def _content(data: DataSettings, training: TrainingSettings) -> str:
    if data.mock_data:
        return mock_content(data.dataset)

    def content(corpus: DatasetInfo) -> str:
        return known_corpus(corpus, cache_folder(corpus.prefix, data.data_cache_path)).content

    if not data.is_blend:
        return content(data.dataset)
    blends = [(*map(content, source.infos), source.weights) for source in data.sources]
    # The order of a blend is one of all samples of the job.
    return hashlib.sha256(json.dumps([blends, samples_of_parts(training)[0]]).encode()).hexdigest()


def changeable() -> list[str]:
    """What ``--allow-changed`` takes, as options without dashes."""
    names = {action.dest for action in build_parser()._actions} - CHANGES_NOTHING - _FIXED
    names = names - {"help", "train_iters"} | set(_OPTION_OF.values())
    return sorted(name.replace("_", "-") for name in names)


def model_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The part of :func:`settings_of` that describes the model, out of all options by name."""
    return {name: options[name] for name in sorted(MODEL)}


def differing_model_settings(saved: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Options of the model that a checkpoint was saved with and that are not those given, in words."""
    default = build_parser().get_default
    return [
        f"{_shown(name, saved.get(name, default(name)))} and not the {_value(name, value)}"
        for name, value in model_settings(options).items()
        if saved.get(name, default(name)) != value
    ]


def compare_model(saved: Mapping[str, Any], settings: JobSettings, source: str) -> list[Change]:
    """As :func:`compare_settings`, for a job that takes the weights and nothing else."""
    of_model = {name: saved[name] for name in saved.keys() & MODEL}
    here = model_settings(settings.options)
    return compare_settings(of_model, here, settings.checkpoint.allow_changed, source)


def compare_settings(
    saved: Mapping[str, Any], here: Mapping[str, Any], allow_changed: Collection[str], source: str
) -> list[Change]:
    """What this job changes on purpose.

    Args:
        saved: :func:`settings_of` the job that saved the checkpoint.
        here: those of this job.
        allow_changed: options, without dashes, that may differ.
        source: the checkpoint, for messages.

    Raises:
        DataError: one line with all settings that differ otherwise, and what to do.
    """
    default = build_parser().get_default
    allowed = {name.replace("-", "_") for name in allow_changed}
    changes, refused = [], []
    for name in dict.fromkeys((*here, *saved)):
        if name in _CONDITIONAL and not (name in here and name in saved):
            continue
        # An option that is newer than the checkpoint was at its default.
        then, now = (side.get(name, default(name)) for side in (saved, here))
        if then == now or (name == "lr_decay_iters" and _follows(saved) and _follows(here)):
            continue
        option = _OPTION_OF.get(name, name)
        if name == "train_iters" or (option in allowed and name not in _FIXED):
            changes.append(Change(f"{_shown(name, now)} (was {_value(name, then)})", name in _ORDERS_SAMPLES))
        else:
            refused.append((name, f"{_shown(name, then)}, this job has {_value(name, now)}"))
    if refused:
        texts = "; ".join(text for _, text in refused)
        raise DataError(f"{source} was trained with {texts}; {_remedy([name for name, _ in refused])}")
    return changes


def _follows(settings: Mapping[str, Any]) -> bool:
    """Whether learning rates decay over the whole job, as they do without ``--lr-decay-iters``."""
    return bool(settings["lr_decay_iters"] == settings["train_iters"])


def _remedy(names: list[str]) -> str:
    if _FIXED.intersection(names):
        return "give the same, or use another checkpoint"
    options = dict.fromkeys(_OPTION_OF.get(name, name).replace("_", "-") for name in names)
    return f"give the same, or change it on purpose with --allow-changed {' '.join(options)}"


def _shown(name: str, value: Any) -> str:
    """A setting as it was given."""
    words = {
        "data": "the data of hash",
        "samples": "samples that are",
        "add_bias_linear": "--disable-bias-linear",
    }
    return f"{words.get(name, flag_of(name))} {_value(name, value)}"


def _value(name: str, value: Any) -> str:
    return str(not value if name == "add_bias_linear" else value)
