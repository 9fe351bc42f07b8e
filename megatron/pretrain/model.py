"""The model of this rank under the chosen schedule, its optimizer and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
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

from helixpipe.kernels.choice import gelu_tanh, quick_gelu
from helixpipe.kernels.extension import load as load_kernels
from helixpipe.layers.attention.choice import Choice, choose, problem_of
from helixpipe.layers.experts import keep_apart
from helixpipe.layers.fusions import can_fuse_rope, fuse_weight_gradients, has_apex_accumulation
from helixpipe.layers.initialization import deferred_initialization, initialize_weights
from helixpipe.layers.spec import (
    LOCAL,
    TRANSFORMER_ENGINE,
    Implementation,
    default_implementation,
    holds_scores,
    leaves_attention_to_engine,
)
from helixpipe.layers.variants import Variants
from helixpipe.megatron_adapter.model_chunks import build_model_chunks
from helixpipe.plan.stage_layers import STAGE_LAYERS
from megatron.pretrain.settings.job import ExpertSettings, JobSettings, ModelSettings
from megatron.pretrain.settings.learning_rate import LearningRate
from megatron.pretrain.settings.precision import make_deterministic


class TrainingState(NamedTuple):
    """What training changes."""

    model: list[torch.nn.Module]
    optimizer: Any
    scheduler: OptimizerParamScheduler


def build_config(settings: JobSettings) -> TransformerConfig:
    """Megatron's model configuration."""
    model, parallel, memory = settings.model, settings.parallel, settings.memory
    # Fused kernels compile through torch.compile, which a CPU run does without.
    fuse = torch.cuda.is_available()
    config = TransformerConfig(
        **_of_model(model),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        **_of_plan(settings),
        virtual_pipeline_model_parallel_size=settings.schedule.virtual_stages,
        # As Megatron sets them. Batched messages between two ranks that are both next and previous to each
        # other would arrive swapped, without an error.
        overlap_p2p_comm=settings.schedule.virtual_stages is not None,
        batch_p2p_comm=settings.schedule.virtual_stages is None,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=model.params_dtype,
        pipeline_dtype=model.params_dtype,
        bf16=model.bf16,
        fp16=model.fp16,
        deterministic_mode=settings.precision.is_deterministic,
        cross_entropy_loss_fusion=fuse and model.cross_entropy_loss_fusion,
        cross_entropy_fusion_impl=model.cross_entropy_fusion_impl,
        calculate_per_token_loss=settings.training.calculate_per_token_loss,
        recompute_granularity=memory.recompute_granularity,
        recompute_method=memory.recompute_method,
        recompute_num_layers=memory.recompute_num_layers,
        recompute_modules=list(memory.recompute_modules),
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        **_of_experts(settings.experts),
        use_cpu_initialization=True,
        # Experts in one product add their biases themselves.
        bias_dropout_fusion=fuse and not (settings.experts.moe_grouped_gemm and model.add_bias_linear),
        bias_activation_fusion=fuse
        and not (model.openai_gelu or model.geglu or model.quick_geglu)
        and model.activation_func_clamp_value is None
        and not model.glu_linear_offset
        # Of an expert's token, its weight among others has no fusion with a bias.
        and not (settings.experts.num_experts is not None and model.add_bias_linear)
        and (model.swiglu or model.add_bias_linear),
        # The fused accumulation is part of Megatron's whole backward pass.
        gradient_accumulation_fusion=(
            has_apex_accumulation()
            and not settings.schedule.splits_backward
            and model.gradient_accumulation_fusion
        ),
        # The fused one turns all sequences of a micro batch alike.
        apply_rope_fusion=model.position_embedding_type == "rope"
        and can_fuse_rope(model.params_dtype)
        and not (settings.data.ends_at_documents and settings.training.micro_batch_size > 1),
    )
    config.finalize_model_grads_func = finalize_model_grads
    _add_variants(config, model)
    return config


def _of_plan(settings: JobSettings) -> dict[str, Any]:
    """What Megatron's modules and functions must know of the plan: how stages and virtual stages differ."""
    plan, parallel, job = settings.schedule.plan, settings.parallel, settings.elastic_job
    parameters = {} if plan is None else plan.parameters
    group = {"microbatch_group_size_per_vp_stage": parameters.get("microbatch_group")}
    differ = STAGE_LAYERS in parameters if job is None else job.stage_layers
    if not differ:
        return group
    return group | {
        "num_layers_in_first_pipeline_stage": parallel.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": parallel.decoder_last_pipeline_num_layers,
    }


def _of_model(model: ModelSettings) -> dict[str, Any]:
    """What the configuration has fields for."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "normalization": model.normalization,
        "layernorm_epsilon": model.norm_epsilon,
        "layernorm_zero_centered_gamma": model.apply_layernorm_1p,
        "softmax_scale": model.softmax_scale,
        "softmax_type": model.softmax_type,
        "gated_linear_unit": model.swiglu or model.geglu or model.quick_geglu,
        "glu_linear_offset": model.glu_linear_offset,
        "activation_func_clamp_value": model.activation_func_clamp_value,
        "activation_func": _activation(model),
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "window_size": model.window_size,
        "window_attn_skip_freq": _listed(model.window_attn_skip_freq),
        "no_rope_freq": _listed(model.no_rope_freq),
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "init_method_std": model.init_method_std,
    }


def _of_experts(experts: ExpertSettings) -> dict[str, Any]:
    """The same of a mixture of experts; empty for a model without one."""
    if experts.num_experts is None:
        return {}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_layer_freq": _listed(experts.moe_layer_freq),
        "moe_ffn_hidden_size": experts.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.moe_shared_expert_intermediate_size,
        "moe_router_topk": experts.moe_router_topk,
        "moe_router_load_balancing_type": experts.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": experts.moe_aux_loss_coeff,
        "moe_z_loss_coeff": experts.moe_z_loss_coeff,
        "moe_router_score_function": experts.moe_router_score_function,
        "moe_router_pre_softmax": experts.moe_router_pre_softmax,
        "moe_router_topk_scaling_factor": experts.moe_router_topk_scaling_factor,
        "moe_router_num_groups": experts.moe_router_num_groups,
        "moe_router_group_topk": experts.moe_router_group_topk,
        "moe_router_dtype": experts.moe_router_dtype,
        "moe_expert_capacity_factor": experts.moe_expert_capacity_factor,
        "moe_token_drop_policy": experts.moe_token_drop_policy,
        "moe_grouped_gemm": experts.moe_grouped_gemm,
        "moe_token_dispatcher_type": experts.moe_token_dispatcher_type,
    }


def _add_variants(config: TransformerConfig, model: ModelSettings) -> None:
    """What the configuration has no fields for, where its readers look for it."""
    config.variants = Variants(
        embedding_scale=model.hidden_size**0.5 if model.scale_embedding else 1.0,
        sandwich_norm=model.sandwich_norm,
        rotary_base_local=model.rotary_base_local,
        attention_softcap=model.attn_logit_softcapping or 0.0,
        final_softcap=model.final_logit_softcapping or 0.0,
    )
    if model.position_embedding_type == "yarn":
        config.yarn_rotary_scaling_factor = model.rotary_scaling_factor
        config.yarn_original_max_position_embeddings = model.yarn_original_max_position_embeddings
        config.yarn_beta_fast, config.yarn_beta_slow = model.yarn_beta_fast, model.yarn_beta_slow
        config.yarn_mscale = config.yarn_mscale_all_dim = None
        config.yarn_correction_range_round_to_int = model.yarn_correction_range_round_to_int


def _activation(model: ModelSettings) -> Callable[[torch.Tensor], torch.Tensor]:
    if model.swiglu:
        return torch.nn.functional.silu
    if model.quick_geglu:
        return quick_gelu
    return gelu_tanh if model.openai_gelu or model.geglu else torch.nn.functional.gelu


def _listed(frequency: int | tuple[int, ...] | None) -> int | list[int] | None:
    """In the form in which Megatron's modules look for it."""
    return list(frequency) if isinstance(frequency, tuple) else frequency


def build_training_state(settings: JobSettings) -> TrainingState:
    """Model chunks, wrapped for mixed precision and data parallelism, with optimizer and scheduler."""
    if torch.cuda.is_available():
        # Now, as their self-test waits for the GPU, which may be waiting for a peer later.
        load_kernels()
    if settings.precision.is_deterministic:
        make_deterministic()
    config = build_config(settings)
    # Here an error is one line; Megatron adds the modules that it was building.
    _choose_attention(settings, config)
    with deferred_initialization(config):
        models = _build_chunks(settings, config)
    if settings.model.gradient_accumulation_fusion:
        fuse_weight_gradients(models)
    chunks = [_wrap(settings, config, model, index) for index, model in enumerate(models)]
    if settings.parallel.overlap_grad_reduce:
        holds = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = holds[0] if len(holds) == 1 else holds
    optimizer = get_megatron_optimizer(_optimizer_config(settings), chunks)
    config.grad_scale_func = optimizer.scale_loss
    return TrainingState(chunks, optimizer, _build_scheduler(settings.learning_rate, optimizer))


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside its wrappers."""
    while isinstance(module, (DistributedDataParallel, Float16Module)):
        module = module.module
    return module


def implementation_of(settings: JobSettings) -> Implementation:
    """What computes the layers: as asked for, or the fastest that is installed and can do it."""
    if settings.model.transformer_impl is not None:
        modules = Implementation(settings.model.transformer_impl)
    else:
        # Only Megatron's local linear layers can leave their weight gradient for later, or run in slices.
        slices_mlp = settings.memory.memory_saving.mlp_chunk_size is not None
        needs_local = settings.model.sandwich_norm or settings.schedule.splits_backward or slices_mlp
        modules = LOCAL if needs_local else default_implementation()
    documents = settings.data.ends_at_documents
    return replace(modules, attention=settings.model.attention_backend, documents=documents)


def describe_attention(settings: JobSettings, state: TrainingState) -> tuple[str, str]:
    """The attention backend of this rank's layers, and with it why not a faster one."""
    choice = _choose_attention(settings, unwrap(state.model[0]).config)
    if choice is None and holds_scores(unwrap(state.model[0]).config, implementation_of(settings)):
        return "unfused", "unfused (Megatron's own, holds the score of each pair of tokens)"
    if choice is None:
        return TRANSFORMER_ENGINE.modules, f"{TRANSFORMER_ENGINE.modules} (its own module chooses)"
    return choice.backend.name, str(choice)


def _choose_attention(settings: JobSettings, config: TransformerConfig) -> Choice | None:
    """What the layers will choose, or None where Megatron's or Transformer Engine's own attention runs."""
    cuts = settings.schedule.execution.cuts_sequences
    if holds_scores(config, implementation_of(settings)):
        return None
    if not cuts and leaves_attention_to_engine(config, implementation_of(settings)):
        return None
    problem = problem_of(config, varies=cuts or settings.data.ends_at_documents)
    return choose(settings.model.attention_backend, problem)


def _build_chunks(settings: JobSettings, config: TransformerConfig) -> list[torch.nn.Module]:
    model, schedule = settings.model, settings.schedule
    arguments: dict[str, Any] = {
        "vocab_size": model.padded_vocab_size,
        "max_sequence_length": model.max_position_embeddings,
        "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
        "position_embedding_type": model.position_embedding_type,
        "rotary_percent": model.rotary_percent,
        "rotary_base": model.rotary_base,
        "seq_len_interpolation_factor": model.rotary_seq_len_interpolation_factor,
        "rope_scaling": model.use_rope_scaling,
        "rope_scaling_factor": model.rope_scaling_factor,
    }
    if settings.elastic_job is not None and schedule.execution.cuts_layers:
        # Built before there is a plan that could say it.
        arguments["attention_range"] = settings.elastic_job.attention_range
    return build_model_chunks(
        schedule.execution,
        schedule.plan,
        config,
        implementation_of(settings),
        settings.memory.memory_saving,
        **arguments,
    )


def _wrap(
    settings: JobSettings, config: TransformerConfig, model: torch.nn.Module, index: int
) -> torch.nn.Module:
    parallel = settings.parallel
    initialize_weights(model, config, settings.training.seed)
    keep_apart(model)
    model = model.cuda()
    if settings.precision.dtype is not torch.float32:
        model = Float16Module(config, model)
    wrapped: torch.nn.Module = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            grad_reduce_in_fp32=settings.precision.reduces_in_fp32,
        ),
        model,
        disable_bucketing=index > 0,
    )
    return wrapped


def _optimizer_config(settings: JobSettings) -> OptimizerConfig:
    optimizer, model, parallel = settings.optimizer, settings.model, settings.parallel
    precision = settings.precision
    return OptimizerConfig(
        optimizer=optimizer.optimizer,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        decoupled_lr=optimizer.decoupled_lr,
        decoupled_min_lr=optimizer.decoupled_min_lr,
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        sgd_momentum=optimizer.sgd_momentum,
        bf16=model.bf16,
        fp16=model.fp16,
        loss_scale=precision.loss_scale,
        initial_loss_scale=precision.initial_loss_scale,
        min_loss_scale=precision.least_loss_scale,
        loss_scale_window=precision.loss_scale_window,
        hysteresis=precision.hysteresis,
        params_dtype=model.params_dtype,
        log_num_zeros_in_grad=settings.output.log_num_zeros_in_grad,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )


def _build_scheduler(rate: LearningRate, optimizer: Any) -> OptimizerParamScheduler:
    """Learning rate and weight decay by samples, so that they do not depend on the batch size."""
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
