"""What a job is told, frozen: one class for each topic, made from the checked command line in one place.

Fields have the names of the options, which :mod:`megatron.pretrain.settings.parser` describes; those with
another name are derived from several. To add an option: a line in the parser, and a field here in its topic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from helixpipe.data.prefix import DatasetInfo
from helixpipe.elastic import ElasticJob
from helixpipe.layers.recomputing_layer import MemorySaving
from helixpipe.plan.cost_model import Recompute, Workload
from megatron.pretrain.settings.data_sources import Corpora, Weights
from megatron.pretrain.settings.ending import Ending
from megatron.pretrain.settings.housekeeping import HousekeepingSettings
from megatron.pretrain.settings.learning_rate import LearningRate
from megatron.pretrain.settings.precision import Precision
from megatron.pretrain.settings.profiling import ProfilingSettings
from megatron.pretrain.settings.recomputation import BY_GRANULARITY
from megatron.pretrain.settings.schedule import ScheduleSettings
from megatron.pretrain.settings.watching import Watching


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model and what computes it; sizes that were left out are filled in.

    Attributes:
        padded_vocab_size: rows of the embedding, given or derived.
        params_dtype: of weights and activations.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    max_position_embeddings: int
    position_embedding_type: str
    rotary_base: int
    rotary_percent: float
    no_rope_freq: int | tuple[int, ...] | None
    rotary_seq_len_interpolation_factor: float | None
    use_rope_scaling: bool
    rope_scaling_factor: float
    rotary_scaling_factor: float | None
    yarn_original_max_position_embeddings: int | None
    yarn_beta_fast: float | None
    yarn_beta_slow: float | None
    yarn_correction_range_round_to_int: bool
    window_size: tuple[int, int] | None
    window_attn_skip_freq: int | tuple[int, ...] | None
    normalization: str
    norm_epsilon: float
    swiglu: bool
    openai_gelu: bool
    geglu: bool
    quick_geglu: bool
    glu_linear_offset: float
    activation_func_clamp_value: float | None
    apply_layernorm_1p: bool
    sandwich_norm: bool
    scale_embedding: bool
    softmax_scale: float | None
    softmax_type: str
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    rotary_base_local: int | None
    qk_layernorm: bool
    add_bias_linear: bool
    add_qkv_bias: bool
    untie_embeddings_and_output_weights: bool
    attention_dropout: float
    hidden_dropout: float
    init_method_std: float
    padded_vocab_size: int
    bf16: bool
    fp16: bool
    params_dtype: torch.dtype
    transformer_impl: str | None
    attention_backend: str
    cross_entropy_loss_fusion: bool
    cross_entropy_fusion_impl: str
    gradient_accumulation_fusion: bool


@dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """A mixture of experts in the place of MLPs; the ranks that share it are with the others.

    Attributes:
        moe_layer_freq: 1 if all layers have experts, else 1 or 0 for each.
    """

    num_experts: int | None
    moe_layer_freq: int | tuple[int, ...]
    moe_ffn_hidden_size: int | None
    moe_shared_expert_intermediate_size: int | None
    moe_router_topk: int
    moe_router_load_balancing_type: str
    moe_aux_loss_coeff: float
    moe_z_loss_coeff: float | None
    moe_router_score_function: str
    moe_router_pre_softmax: bool
    moe_router_topk_scaling_factor: float | None
    moe_router_num_groups: int | None
    moe_router_group_topk: int | None
    moe_router_dtype: str | None
    moe_expert_capacity_factor: float | None
    moe_token_drop_policy: str
    moe_grouped_gemm: bool
    moe_token_dispatcher_type: str


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """This rank among the others, and what they share."""

    rank: int
    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    data_parallel_size: int
    decoder_first_pipeline_num_layers: int | None
    decoder_last_pipeline_num_layers: int | None
    expert_model_parallel_size: int
    expert_tensor_parallel_size: int
    sequence_parallel: bool
    use_distributed_optimizer: bool
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    distributed_timeout_minutes: int


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What is computed again, or in slices, to keep less.

    Attributes:
        memory_saving: of this project; the options of recomputation are Megatron's.
    """

    memory_limit_gib: float | None
    recompute_granularity: str | None
    recompute_method: str | None
    recompute_num_layers: int | None
    recompute_modules: tuple[str, ...]
    memory_saving: MemorySaving

    @property
    def levels(self) -> Recompute | tuple[Recompute, ...]:
        """What layers compute again, all or each."""
        if self.recompute_granularity is None:
            return self.memory_saving.recompute
        return BY_GRANULARITY[self.recompute_granularity]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Batches and iterations.

    Attributes:
        num_microbatches: of one data-parallel rank and iteration.
        max_seq_length: of a document under schedules that do not join them; None under others.
        elastic_costs: what plans of such batches are made by; None under others.
    """

    micro_batch_size: int
    global_batch_size: int
    num_microbatches: int
    seq_length: int
    max_seq_length: int | None
    elastic_costs: Path | None
    train_iters: int
    eval_interval: int
    eval_iters: int
    calculate_per_token_loss: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How weights change; rates over the job are in :class:`LearningRate`."""

    optimizer: str
    lr: float
    min_lr: float
    decoupled_lr: float | None
    decoupled_min_lr: float | None
    weight_decay: float
    clip_grad: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    sgd_momentum: float


def cache_folder(prefix: str, data_cache_path: Path | None) -> Path:
    """Where the indices of the dataset of that prefix are kept."""
    return data_cache_path or Path(prefix).parent / "cache"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where samples come from.

    Attributes:
        corpora: the datasets of ``--data-path``; empty with ``mock_data``, which has no files.
        weights: the share of samples from each; None for all samples of each.
        parts: those of training and of validation, if they are not divided by ``split``; else empty.
        ends_at_documents: attention has to find the documents in joined sequences.
        dataset: what the headers of their files say, of all together.
    """

    corpora: tuple[DatasetInfo, ...]
    weights: Weights
    parts: tuple[Corpora | None, ...]
    mock_data: bool
    split: str
    data_cache_path: Path | None
    num_workers: int
    eod_mask_loss: bool
    mmap_bin_files: bool
    reset_position_ids: bool
    reset_attention_mask: bool
    ends_at_documents: bool
    dataset: DatasetInfo

    @property
    def is_blend(self) -> bool:
        """Whether samples are those of Megatron's builder for the whole job, mixed or of parts."""
        return len(self.corpora) > 1 or self.weights is not None or bool(self.parts)

    @property
    def sources(self) -> tuple[Corpora, ...]:
        """What is divided into parts, or the datasets of each part."""
        return tuple(filter(None, self.parts)) or (Corpora(self.corpora, self.weights),)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Files that a job can go on from."""

    save: Path | None
    save_interval: int | None
    keep_checkpoints: int | None
    set_aside_checkpoints: bool
    async_save: bool
    on_save_failure: str
    load: Path | None
    pretrained_checkpoint: Path | None
    load_fallback: bool
    finetune: bool
    no_load_optim: bool
    allow_changed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is told of iterations."""

    log_interval: int
    metrics_jsonl: Path | None
    trace_dir: Path | None
    log_params_norm: bool
    log_num_zeros_in_grad: bool

    @property
    def measures(self) -> bool:
        """True if operations are timed."""
        return self.metrics_jsonl is not None or self.trace_dir is not None


@dataclass(frozen=True, kw_only=True)
class HealthSettings:
    """What watches the job."""

    hang_timeout_s: float | None
    failure_dir: Path | None
    check_gradients_every: int | None
    check_layers_every: int | None


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Everything about a job.

    Attributes:
        schedule: how it is scheduled, with the plan.
        precision: number formats and the scaling of losses.
        learning_rate: with weight decay, over the job.
        elastic_job: what batches are planned by where each has its own plan; None elsewhere.
        ending, housekeeping, watching: see there.
        profiling: what torch's profiler watches on this rank; None for nothing.
        workload: the model and how it is cut, for the cost model.
        needless_flags: a line about Megatron's flags that change nothing here; empty if there are none.
        other_defaults: a line about options that were left out, where Megatron's default is another; empty
            for none.
        options: all options by name, as they are used: what ranks and checkpoints are compared by. Whoever
            needs one of them takes it from its topic.
    """

    model: ModelSettings
    experts: ExpertSettings
    parallel: ParallelSettings
    memory: MemorySettings
    training: TrainingSettings
    optimizer: OptimizerSettings
    data: DataSettings
    checkpoint: CheckpointSettings
    output: OutputSettings
    health: HealthSettings
    schedule: ScheduleSettings
    precision: Precision
    learning_rate: LearningRate
    elastic_job: ElasticJob | None
    ending: Ending
    housekeeping: HousekeepingSettings
    watching: Watching
    profiling: ProfilingSettings | None
    workload: Workload
    needless_flags: str
    other_defaults: str
    options: Mapping[str, Any]


_TOPICS = {
    "model": ModelSettings,
    "experts": ExpertSettings,
    "parallel": ParallelSettings,
    "memory": MemorySettings,
    "training": TrainingSettings,
    "optimizer": OptimizerSettings,
    "data": DataSettings,
    "checkpoint": CheckpointSettings,
    "output": OutputSettings,
    "health": HealthSettings,
}


def topics_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of :class:`JobSettings` that are made of options and of what is derived from them.

    Args:
        values: checked, for every field.
    """
    return {
        name: topic(**{field.name: _frozen(values[field.name]) for field in fields(topic)})
        for name, topic in _TOPICS.items()
    }


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
