"""The model of this rank under the chosen schedule, its optimizer and its learning-rate schedule."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from helixpipe.kernels.extension import load as load_kernels
from helixpipe.layers.attention.choice import Choice, choose, problem_of
from helixpipe.layers.fusions import can_fuse_rope, fuse_weight_gradients, has_apex_accumulation
from helixpipe.layers.initialization import deferred_initialization, initialize_weights
from helixpipe.layers.recomputing_layer import MemorySaving
from helixpipe.layers.spec import (
    LOCAL,
    TRANSFORMER_ENGINE,
    Implementation,
    default_implementation,
    holds_scores,
    leaves_attention_to_engine,
)
from helixpipe.megatron_adapter.model_chunks import build_model_chunks
from megatron.pretrain.settings.learning_rate import LearningRate
from megatron.pretrain.settings.precision import Precision, make_deterministic
from megatron.pretrain.settings.schedule import ScheduleSettings


class TrainingState(NamedTuple):
    """What training changes."""

    model: list[torch.nn.Module]
    optimizer: Any
    scheduler: OptimizerParamScheduler


def build_config(args: argparse.Namespace) -> TransformerConfig:
    """Megatron's model configuration."""
    # Fused kernels compile through torch.compile, which a CPU run does without.
    fuse = torch.cuda.is_available()
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        hidden_dropout=args.hidden_dropout,
        attention_dropout=args.attention_dropout,
        init_method_std=args.init_method_std,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.schedule.virtual_stages,
        # As Megatron sets them. Batched messages between two ranks that are both next and previous to each
        # other would arrive swapped, without an error.
        overlap_p2p_comm=args.schedule.virtual_stages is not None,
        batch_p2p_comm=args.schedule.virtual_stages is None,
        sequence_parallel=args.sequence_parallel,
        params_dtype=args.params_dtype,
        pipeline_dtype=args.params_dtype,
        bf16=args.bf16,
        fp16=args.fp16,
        deterministic_mode=args.deterministic_mode,
        cross_entropy_loss_fusion=fuse and args.cross_entropy_loss_fusion,
        cross_entropy_fusion_impl=args.cross_entropy_fusion_impl,
        calculate_per_token_loss=args.calculate_per_token_loss,
        recompute_granularity=args.recompute_granularity,
        recompute_method=args.recompute_method,
        recompute_num_layers=args.recompute_num_layers,
        recompute_modules=args.recompute_modules,
        use_cpu_initialization=True,
        bias_dropout_fusion=fuse,
        bias_activation_fusion=fuse and (args.swiglu or args.add_bias_linear),
        # The fused accumulation is part of Megatron's whole backward pass.
        gradient_accumulation_fusion=(
            has_apex_accumulation()
            and not args.schedule.splits_backward
            and args.gradient_accumulation_fusion
        ),
        apply_rope_fusion=args.position_embedding_type == "rope" and can_fuse_rope(args.params_dtype),
    )
    config.finalize_model_grads_func = finalize_model_grads
    return config


def build_training_state(args: argparse.Namespace) -> TrainingState:
    """Model chunks, wrapped for mixed precision and data parallelism, with optimizer and scheduler."""
    if torch.cuda.is_available():
        # Now, as their self-test waits for the GPU, which may be waiting for a peer later.
        load_kernels()
    if args.precision.is_deterministic:
        make_deterministic()
    config = build_config(args)
    # Here an error is one line; Megatron adds the modules that it was building.
    _choose_attention(args, config)
    with deferred_initialization(config):
        models = _build_chunks(args, config)
    if args.gradient_accumulation_fusion:
        fuse_weight_gradients(models)
    chunks = [_wrap(args, config, model, index) for index, model in enumerate(models)]
    if args.overlap_grad_reduce:
        holds = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = holds[0] if len(holds) == 1 else holds
    optimizer = get_megatron_optimizer(_optimizer_config(args), chunks)
    config.grad_scale_func = optimizer.scale_loss
    return TrainingState(chunks, optimizer, _build_scheduler(args, optimizer))


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside its wrappers."""
    while isinstance(module, (DistributedDataParallel, Float16Module)):
        module = module.module
    return module


def implementation_of(args: argparse.Namespace) -> Implementation:
    """What computes the layers: as asked for, or the fastest that is installed and can do it."""
    if args.transformer_impl is not None:
        modules = Implementation(args.transformer_impl)
    else:
        # Only Megatron's local linear layers can leave their weight gradient for later, or run in slices.
        needs_local = args.schedule.splits_backward or args.memory_saving.mlp_chunk_size is not None
        modules = LOCAL if needs_local else default_implementation()
    return replace(modules, attention=args.attention_backend)


def describe_attention(args: argparse.Namespace, state: TrainingState) -> tuple[str, str]:
    """The attention backend of this rank's layers, and with it why not a faster one."""
    choice = _choose_attention(args, unwrap(state.model[0]).config)
    if choice is None and holds_scores(unwrap(state.model[0]).config, implementation_of(args)):
        return "unfused", "unfused (Megatron's own, holds the score of each pair of tokens)"
    if choice is None:
        return TRANSFORMER_ENGINE.modules, f"{TRANSFORMER_ENGINE.modules} (its own module chooses)"
    return choice.backend.name, str(choice)


def _choose_attention(args: argparse.Namespace, config: TransformerConfig) -> Choice | None:
    """What the layers will choose, or None where Megatron's or Transformer Engine's own attention runs."""
    varies = args.schedule.execution.cuts_sequences
    if holds_scores(config, implementation_of(args)):
        return None
    if not varies and leaves_attention_to_engine(config, implementation_of(args)):
        return None
    return choose(args.attention_backend, problem_of(config, varies=varies))


def _build_chunks(args: argparse.Namespace, config: TransformerConfig) -> list[torch.nn.Module]:
    implementation = implementation_of(args)
    saving: MemorySaving = args.memory_saving
    arguments: dict[str, Any] = {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
        "rotary_percent": args.rotary_percent,
        "rotary_base": args.rotary_base,
        "seq_len_interpolation_factor": args.rotary_seq_len_interpolation_factor,
        "rope_scaling": args.use_rope_scaling,
        "rope_scaling_factor": args.rope_scaling_factor,
    }
    schedule: ScheduleSettings = args.schedule
    return build_model_chunks(schedule.execution, schedule.plan, config, implementation, saving, **arguments)


def _wrap(
    args: argparse.Namespace, config: TransformerConfig, model: torch.nn.Module, index: int
) -> torch.nn.Module:
    initialize_weights(model, config, args.seed)
    model = model.cuda()
    if args.precision.dtype is not torch.float32:
        model = Float16Module(config, model)
    wrapped: torch.nn.Module = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=args.use_distributed_optimizer,
            overlap_grad_reduce=args.overlap_grad_reduce,
            overlap_param_gather=args.overlap_param_gather,
            grad_reduce_in_fp32=args.precision.reduces_in_fp32,
        ),
        model,
        disable_bucketing=index > 0,
    )
    return wrapped


def _optimizer_config(args: argparse.Namespace) -> OptimizerConfig:
    precision: Precision = args.precision
    return OptimizerConfig(
        optimizer=args.optimizer,
        lr=args.lr,
        min_lr=args.min_lr,
        decoupled_lr=args.decoupled_lr,
        decoupled_min_lr=args.decoupled_min_lr,
        weight_decay=args.weight_decay,
        clip_grad=args.clip_grad,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        sgd_momentum=args.sgd_momentum,
        bf16=args.bf16,
        fp16=args.fp16,
        loss_scale=precision.loss_scale,
        initial_loss_scale=precision.initial_loss_scale,
        min_loss_scale=precision.least_loss_scale,
        loss_scale_window=precision.loss_scale_window,
        hysteresis=precision.hysteresis,
        params_dtype=args.params_dtype,
        log_num_zeros_in_grad=args.log_num_zeros_in_grad,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_param_gather=args.overlap_param_gather,
    )


def _build_scheduler(args: argparse.Namespace, optimizer: Any) -> OptimizerParamScheduler:
    """Learning rate and weight decay by samples, so that they do not depend on the batch size."""
    rate: LearningRate = args.learning_rate
    return OptimizerParamScheduler(
        optimizer,
        init_lr=rate.first,
        max_lr=rate.highest,
        min_lr=rate.lowest,
        lr_warmup_steps=rate.warmup,
        lr_decay_steps=rate.decay,
        lr_decay_style=rate.style,
        start_wd=rate.first_weight_decay,
        end_wd=rate.last_weight_decay,
        wd_incr_steps=rate.job,
        wd_incr_style=rate.weight_decay_style,
        wsd_decay_steps=rate.last_decay,
        lr_wsd_decay_style=rate.last_style,
        # A resumed run follows the arguments it is given.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
