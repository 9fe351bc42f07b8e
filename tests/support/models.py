"""Small models, data and one-iteration runs under Megatron's schedules and under plans."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from helixpipe.megatron_adapter import cpu_backend  # noqa: E402

cpu_backend.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from split_plans import with_weight_gradients  # noqa: E402

from helixpipe.kernels.choice import quick_gelu  # noqa: E402
from helixpipe.layers.attention.context_parallel import own_pieces  # noqa: E402
from helixpipe.layers.elastic.context import ContextStore  # noqa: E402
from helixpipe.layers.elastic.model import build_elastic_gpt  # noqa: E402
from helixpipe.layers.gpt import build_gpt  # noqa: E402
from helixpipe.layers.initialization import (  # noqa: E402
    canonical_parameters,
    deferred_initialization,
    initialize_weights,
)
from helixpipe.layers.recomputing_layer import NOTHING_SAVED, MemorySaving  # noqa: E402
from helixpipe.layers.segmented_gpt import SegmentedGPTModel  # noqa: E402
from helixpipe.layers.spec import LOCAL, Implementation  # noqa: E402
from helixpipe.layers.stage import build_stage  # noqa: E402
from helixpipe.megatron_adapter.forward_backward import (  # noqa: E402
    PlannedForwardBackward,
    SegmentForwardBackward,
    SlicedSegmentForwardBackward,
    SliceForwardBackward,
    StageForwardBackward,
)
from helixpipe.megatron_adapter.plan_source import PlanOnDemand  # noqa: E402
from helixpipe.plan import Kind, Plan, ScheduleRequest, build_plan  # noqa: E402
from helixpipe.plan.cost_model import Recompute  # noqa: E402
from helixpipe.plan.cost_model.levels import parse_levels  # noqa: E402
from helixpipe.plan.equal_time import equal_time_ends  # noqa: E402
from helixpipe.plan.execution import Execution  # noqa: E402
from helixpipe.plan.schedules import SCHEDULES  # noqa: E402
from helixpipe.plan.slice_ends import with_slice_ends  # noqa: E402
from helixpipe.runtime.trace import HostClock  # noqa: E402

VOCABULARY = 96
SEED = 1234


@dataclass(frozen=True)
class Case:
    """One configuration: layout, schedule and model style."""

    pp: int
    tp: int = 1
    dp: int = 1
    cp: int = 1
    # The same data for all replicas.
    same_data: bool = False
    # All tokens have a loss, and the loss function counts them.
    unmasked: bool = False
    schedule: str = "helix"
    fold: int = 2
    rounds: int = 1
    style: str = "gpt"
    num_layers: int = 4
    seq_length: int = 24
    micro_batch_size: int = 1
    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    per_token_loss: bool = False
    groups: int | None = None
    tied: bool | None = None
    recompute: str | None = None
    attention_range: str = "core"
    head_placement: str = "first"
    without_attention: bool = False
    levels: str = "none"
    mlp_chunk: int | None = None
    loss_chunk: int | None = None
    hidden_dropout: float = 0.0
    modules: str = LOCAL.modules
    # Micro batches of helix with W: of all rounds, of the last, as the schedule itself has them, or none.
    split: str = "none"
    interlocked: bool = False
    # Micro batches beyond whole rounds.
    extra: int = 0
    # Of each stage, where they differ.
    stage_layers: tuple[int, ...] = ()
    num_slices: int = 1
    resend_context: bool = False
    documents: bool = False
    experts: int | None = None
    ep: int = 1
    # Ranks that share each expert: as many as share a layer if None.
    etp: int | None = None
    # Further fields of the configuration of experts, by name.
    router: tuple[tuple[str, Any], ...] = ()

    @property
    def has_weight_gradients(self) -> bool:
        """True for plans with W."""
        return self.split != "none" or SCHEDULES[self.schedule].splits_backward

    @property
    def implementation(self) -> Implementation:
        """What computes the layers, with any attention backend."""
        return Implementation(self.modules, documents=self.documents)

    @property
    def is_tied(self) -> bool:
        """Embedding and head share a weight: by default GPT's do and Llama's do not."""
        return self.style == "gpt" if self.tied is None else self.tied

    @property
    def saving(self) -> MemorySaving:
        """What the planned model does to keep less; the reference does nothing."""
        levels = (
            Recompute.WITHOUT_ATTENTION
            if self.without_attention
            else parse_levels(self.levels, self.num_layers)
        )
        return MemorySaving(levels, self.mlp_chunk, self.loss_chunk)

    @property
    def chunks_per_rank(self) -> int:
        return 2 if SCHEDULES[self.schedule].needs_untied_weights else 1

    @property
    def world_size(self) -> int:
        return self.pp * self.tp * self.dp * self.cp

    @property
    def num_microbatches(self) -> int:
        return self.pp * self.fold * self.rounds + self.extra

    def __str__(self) -> str:
        default = Case(pp=self.pp)
        words = [
            self.schedule,
            f"pp{self.pp}",
            f"tp{self.tp}",
            f"dp{self.dp}",
            f"fold{self.fold}",
            self.style,
        ]
        words += [
            f"{name}={value}"
            for name, value in vars(self).items()
            if name not in ("schedule", "pp", "tp", "dp", "fold", "style") and value != getattr(default, name)
        ]
        return "-".join(words)


def initialize(case: Case) -> None:
    """Megatron's groups and random states for a case."""
    # Making Megatron's twenty gloo groups on eight ranks takes seconds: cases of one layout share them.
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            case.tp,
            case.pp,
            context_parallel_size=case.cp,
            expert_model_parallel_size=case.ep,
            expert_tensor_parallel_size=case.tp if case.etp is None else case.etp,
        )
    assert parallel_state.get_tensor_model_parallel_world_size() == case.tp
    assert parallel_state.get_pipeline_model_parallel_world_size() == case.pp
    assert parallel_state.get_context_parallel_world_size() == case.cp
    tensor_parallel.model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)


def forget_router_losses() -> None:
    """What Megatron keeps of routers beside the model: what it has logged, and the weight of their losses."""
    if hasattr(moe_utils, "get_moe_metrics_tracker"):  # since 0.18
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

        destroy_moe_metrics_tracker()
    else:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None


def make_config(case: Case) -> TransformerConfig:
    llama = case.style != "gpt"
    config = TransformerConfig(
        num_layers=case.num_layers,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=case.groups or (2 if llama else 4),
        ffn_hidden_size=80 if llama else 128,
        normalization="RMSNorm" if llama else "LayerNorm",
        gated_linear_unit=llama,
        activation_func=torch.nn.functional.silu if llama else torch.nn.functional.gelu,
        add_bias_linear=not llama,
        hidden_dropout=case.hidden_dropout,
        attention_dropout=0.0,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        context_parallel_size=case.cp,
        sequence_parallel=case.sequence_parallel,
        params_dtype=case.dtype,
        pipeline_dtype=case.dtype,
        bf16=case.dtype is torch.bfloat16,
        calculate_per_token_loss=case.per_token_loss,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        recompute_granularity=case.recompute,
        recompute_method="uniform" if case.recompute == "full" else None,
        recompute_num_layers=1 if case.recompute == "full" else None,
        # Large enough that every gradient is far from rounding noise.
        init_method_std=0.2,
        **_experts(case),
        **_stages(case),
    )
    if case.style == "oss":
        # As gpt-oss without its experts, and clamped where it shows.
        config.softmax_type, config.add_bias_linear = "learnable", True
        config.activation_func, config.glu_linear_offset = quick_gelu, 1.0
        config.activation_func_clamp_value = 0.5
        config.no_rope_freq = [layer % 2 for layer in range(case.num_layers)]
    config.finalize_model_grads_func = finalize_model_grads
    return config


def _experts(case: Case) -> dict[str, Any]:
    if case.experts is None:
        return {}
    return {
        "num_moe_experts": case.experts,
        "moe_ffn_hidden_size": 40,
        "expert_model_parallel_size": case.ep,
        "expert_tensor_parallel_size": case.tp if case.etp is None else case.etp,
        "moe_aux_loss_coeff": 0.1,
        "moe_token_dispatcher_type": "alltoall",
        # Lists cannot be hashed, as cases are.
        **{name: list(value) if isinstance(value, tuple) else value for name, value in case.router},
    }


def _stages(case: Case) -> dict[str, Any]:
    if not case.stage_layers:
        return {}
    first, *_, last = case.stage_layers
    return {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}


def _model_arguments(case: Case) -> dict[str, Any]:
    llama = case.style != "gpt"
    return {
        "vocab_size": VOCABULARY,
        "max_sequence_length": case.seq_length,
        "share_embeddings_and_output_weights": case.is_tied,
        "position_embedding_type": "rope" if llama else "learned_absolute",
    }


def build_reference(
    case: Case, saving: MemorySaving = NOTHING_SAVED, *, whole: bool = False, **values: Any
) -> list[torch.nn.Module]:
    """Megatron's GPTModel with the same core attention, wrapped for training: a stage, or all of it.

    ``values`` are set in its configuration afterwards.
    """
    config = make_config(case)
    vars(config).update(values)
    if whole:
        assert not case.is_tied, "Megatron would add up the gradients of embedding and head over ranks"
        config.pipeline_model_parallel_size = 1
    with deferred_initialization(config):
        model = build_gpt(
            config,
            case.implementation,
            saving,
            pre_process=whole or parallel_state.is_pipeline_first_stage(),
            post_process=whole or parallel_state.is_pipeline_last_stage(),
            **_model_arguments(case),
        )
    return _wrap(case, config, [model])


def build_planned(case: Case) -> list[torch.nn.Module]:
    """This rank's model chunks for the case's schedule, wrapped for training."""
    execution = SCHEDULES[case.schedule].execution
    if execution is not None and execution.cuts_layers:
        return _build_helix(case)
    if execution is Execution.SLICES:
        return _build_sliced(case)
    if case.chunks_per_rank == 1:
        return build_reference(case, case.saving)
    config = make_config(case)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    num_stages = 2 * case.pp
    with deferred_initialization(config):
        models = [
            build_stage(
                config, case.implementation, stage, num_stages, saving=case.saving, **_model_arguments(case)
            )
            for stage in (rank, num_stages - 1 - rank)
        ]
    return _wrap(case, config, models)


def _build_sliced(case: Case) -> list[torch.nn.Module]:
    config = make_config(case)
    with deferred_initialization(config):
        model = build_elastic_gpt(
            config,
            case.implementation,
            case.saving,
            recomputes_by_plan=False,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            **_model_arguments(case),
        )
    return _wrap(case, config, [model])


def _build_helix(case: Case) -> list[torch.nn.Module]:
    config = make_config(case)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    per_layer = 2 if case.schedule == "helix" or case.attention_range == "core" else 3
    owned = [per_layer * layer for layer in range(case.num_layers) if layer % case.pp == rank]
    if rank == 0:
        owned.append(per_layer * case.num_layers)
    with deferred_initialization(config):
        model = SegmentedGPTModel(
            config,
            case.implementation,
            owned,
            attention_range=case.attention_range,
            lends_head=case.head_placement == "spread",
            saving=case.saving,
            contexts=None if case.schedule == "helix" else ContextStore(),
            **_model_arguments(case),
        )
    return _wrap(case, config, [model])


def _wrap(case: Case, config: TransformerConfig, models: list[torch.nn.Module]) -> list[torch.nn.Module]:
    chunks = [_wrap_chunk(case, config, model) for model in models]
    if case.overlap:
        holds = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = holds[0] if len(holds) == 1 else holds
    return chunks


def _wrap_chunk(case: Case, config: TransformerConfig, model: torch.nn.Module) -> torch.nn.Module:
    initialize_weights(model, config, SEED)
    # Constants would hide errors in the gradients of biases and norms.
    for name, parameter in canonical_parameters(model):
        if parameter.dim() == 1:
            generator = torch.Generator().manual_seed(sum(name.encode()))
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
            noise = torch.rand(parameter.numel() * case.tp, generator=generator)
            if not getattr(parameter, "tensor_model_parallel", False):
                tp_rank = 0
            parameter.data += 0.1 * noise.chunk(case.tp)[tp_rank][: parameter.numel()].to(parameter.dtype)
    if case.dtype is torch.float64:
        model = model.double()
    if case.dtype is torch.bfloat16:
        model = Float16Module(config, model)
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=case.distributed_optimizer,
            overlap_grad_reduce=case.overlap,
            overlap_param_gather=case.overlap and case.distributed_optimizer,
            grad_reduce_in_fp32=case.dtype is torch.bfloat16,
            bucket_size=4000 if case.overlap else None,
        ),
        model.cuda(),
    )


def build_optimizer(case: Case, chunks: list[torch.nn.Module]) -> Any:
    return get_megatron_optimizer(
        OptimizerConfig(
            lr=1e-3,
            bf16=case.dtype is torch.bfloat16,
            params_dtype=case.dtype,
            use_distributed_optimizer=case.distributed_optimizer,
            overlap_param_gather=case.overlap and case.distributed_optimizer,
            clip_grad=1.0,
        ),
        chunks,
    )


def batches(case: Case, step: int = 0, tamper: bool = False) -> Any:
    """The micro batches of one data-parallel replica in one iteration; tampered: one label is wrong."""
    replica = 0 if case.same_data else parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(1000 * step + replica)
    shape = (case.micro_batch_size, case.seq_length + 1)
    for index in range(case.num_microbatches):
        text = torch.randint(VOCABULARY, shape, generator=generator)
        mask = (torch.rand(shape[0], case.seq_length, generator=generator) > 0.2).float()
        if tamper and index == case.num_microbatches - 1:
            text[0, -1] = (text[0, -1] + 1) % VOCABULARY
            mask[0, -1] = 1.0
        if case.unmasked:
            mask.fill_(1.0)
        positions = torch.arange(case.seq_length).expand_as(mask)
        rank = parallel_state.get_context_parallel_rank()
        tensors = (text[:, :-1], text[:, 1:], mask, positions)
        yield tuple(own_pieces(tensor, 1, case.cp, rank).cuda() for tensor in tensors)


def make_forward_step(case: Case) -> Any:
    """A forward step in Megatron's form, with a masked loss."""

    def loss_func(mask: torch.Tensor, losses: torch.Tensor) -> Any:
        total = (losses * mask).sum()
        count = mask.sum()
        if case.per_token_loss or case.unmasked:
            return total, count.int(), {"lm loss": torch.stack([total.detach(), count])}
        return total / count, {"lm loss": (total / count).detach()}

    def forward_step(data_iterator: Any, model: Any) -> Any:
        tokens, labels, mask, positions = next(data_iterator)
        output = model(tokens, positions, None, labels=labels)
        return output, lambda output: loss_func(mask, output)

    return forward_step


def run_iteration(
    case: Case,
    chunks: list[torch.nn.Module],
    forward_backward: Any,
    step: int = 0,
    *,
    forward_only: bool = False,
    tamper: bool = False,
) -> list[Any]:
    """One iteration's forward and backward; the losses, where they are known."""
    forget_router_losses()
    if not forward_only:
        for chunk in chunks:
            chunk.zero_grad_buffer()
    losses = forward_backward(
        forward_step_func=make_forward_step(case),
        data_iterator=[batches(case, step, tamper) for _ in chunks],
        model=chunks,
        num_microbatches=case.num_microbatches,
        seq_length=case.seq_length,
        micro_batch_size=case.micro_batch_size,
        forward_only=forward_only,
    )
    return [entry["lm loss"].tolist() for entry in losses]


def everywhere(values: list[Any], plan: Plan | None = None) -> list[Any]:
    """Losses by micro batch, on all ranks: from the one that has them, or from where a plan computes them."""
    gathered: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(gathered, values, group=parallel_state.get_pipeline_model_parallel_group())
    if plan is None or plan.slices:
        return next(entry for entry in gathered if entry)
    losses = {
        op.micro_batch: loss
        for order, found in zip(plan.orders, gathered, strict=True)
        for op, loss in zip(
            (op for op in order if op.kind is Kind.F and op.segment == plan.num_segments - 1),
            found,
            strict=True,
        )
    }
    return [losses[micro_batch] for micro_batch in range(plan.num_microbatches)]


def gather_gradients(chunks: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """main_grad of every parameter of the whole pipeline, by canonical name."""
    mine: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        inner = chunk.module
        inner = inner.module if isinstance(inner, Float16Module) else inner
        mine.update(
            (name, parameter.main_grad.cpu().clone()) for name, parameter in canonical_parameters(inner)
        )
    gathered: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(gathered, mine, group=parallel_state.get_pipeline_model_parallel_group())
    groups: list[Any] = [None] * parallel_state.get_expert_model_parallel_world_size()
    dist.all_gather_object(groups, gathered, group=parallel_state.get_expert_model_parallel_group())
    gathered = [share for group in groups for share in group]
    whole: dict[str, torch.Tensor] = {}
    for share in gathered:
        whole.update(share)
    return whole


def planned_schedule(case: Case) -> PlannedForwardBackward:
    """The case's schedule, executed from its plan."""
    if case.schedule == "helix":
        return SegmentForwardBackward(_helix_plan(case), clock=HostClock())
    execution = SCHEDULES[case.schedule].execution
    if execution is Execution.SLICES:
        return SliceForwardBackward(sliced_plan(case), clock=HostClock())
    if execution is Execution.SLICED_SEGMENTS:
        return SlicedSegmentForwardBackward(sliced_plan(case), clock=HostClock())
    plans = PlanOnDemand(case.schedule, chunks_per_rank=case.chunks_per_rank)
    return StageForwardBackward(plans, clock=HostClock())


def sliced_plan(case: Case) -> Plan:
    """The plan of slices of equal time, where attention to 20 tokens takes as long as the rest."""
    options: dict[str, Any] = {"num_slices": case.num_slices}
    if case.schedule == "sliced-helix":
        options = {
            "num_fold": case.fold,
            "attention_range": case.attention_range,
            "head_placement": case.head_placement,
            "resend_context": case.resend_context or None,
        }
    request = ScheduleRequest(
        num_layers=case.num_layers,
        num_ranks=case.pp,
        num_microbatches=case.num_microbatches,
        **options,
    )
    plan = build_plan(case.schedule, request)
    multiple = case.tp if case.sequence_parallel else 1
    ends = equal_time_ends(case.seq_length, len(plan.slices[0]), 20.0, 1.0, multiple)
    return with_slice_ends(plan, ends)


def _helix_plan(case: Case) -> Plan:
    request = ScheduleRequest(
        num_layers=case.num_layers,
        num_ranks=case.pp,
        num_microbatches=case.num_microbatches,
        num_fold=case.fold,
        attention_range=case.attention_range,
        head_placement=case.head_placement,
        round_order="interlocked" if case.interlocked else None,
        split_weight_gradients=case.split == "planned" or None,
    )
    plan = build_plan("helix", request)
    if case.split not in ("all", "last"):
        return plan
    # Each W some backwards after its own B.
    first = case.num_microbatches - case.pp * case.fold if case.split == "last" else 0
    return with_weight_gradients(plan, 3, range(first, case.num_microbatches))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))
