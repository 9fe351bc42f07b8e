"""The schedule of a job: planned once, here, for everything that comes after."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helixpipe.commands.parser import flag_of
from helixpipe.plan import Plan, ScheduleRequest, build_plan, validate
from helixpipe.plan.build import complete, find_schedule
from helixpipe.plan.execution import Execution
from helixpipe.plan.fit import check_executable, check_fits, check_stages_fit, stages_follow_ranks
from helixpipe.plan.layer_patterns import experts_of_layers, kinds_of_mlps
from helixpipe.plan.schedules import SCHEDULES, Schedule
from helixpipe.plan.schedules.request import KnownCosts
from helixpipe.plan.stage_layers import STAGE_LAYERS, parse_stage_layers
from helixpipe.plan.windows import join_kinds, kinds_of_windows, windows_of_layers
from megatron.pretrain.settings.recomputation import asked_levels
from megatron.pretrain.settings.schedule_limits import check_weight_gradients
from megatron.pretrain.settings.sizes import nearest
from megatron.pretrain.settings.stages import stage_layers_of

AUTO = "auto"
DEFAULT_SCHEDULE = "1f1b"
# As in Megatron, where --num-layers-per-virtual-pipeline-stage is given and no schedule.
DEFAULT_WITH_VIRTUAL_STAGES = "interleaved"
# What a plan file says by itself.
_SAID_BY_PLAN = (
    "pipeline_schedule", "num_fold", "num_slices", "attention_range", "head_placement",
    "round_order", "split_weight_gradients", "resend_context", "num_layers_per_virtual_pipeline_stage",
    "microbatch_group_size_per_virtual_pipeline_stage",
)  # fmt: skip


@dataclass(frozen=True)
class ScheduleSettings:
    """How a job is scheduled.

    Attributes:
        name: of the schedule.
        execution: how it is carried out.
        plan: of every iteration, validated: the object that is executed. None where each batch has its own.
        reason: a line that tells why it was chosen, where the user left the choice open.
        hardware: what its times were predicted for; None for this GPU.
    """

    name: str
    execution: Execution
    plan: Plan | None
    reason: str = ""
    hardware: str | None = None

    @property
    def virtual_stages(self) -> int | None:
        """Model chunks per rank under Megatron's interleaved functions; None where there is one."""
        if self.plan is None or self.execution is not Execution.MEGATRON:
            return None
        per_rank = self.plan.num_segments // self.plan.num_ranks
        return per_rank if per_rank > 1 else None

    @property
    def splits_backward(self) -> bool:
        """True if weight gradients are computed apart."""
        return self.plan is not None and self.plan.splits_backward


def executable_schedule(name: str) -> Schedule:
    """The registry entry of a schedule for training.

    Raises:
        ValueError: it is unknown, or can only be planned.
    """
    entry = find_schedule(name)
    if entry.execution is None:
        raise ValueError(
            f"{name} can be planned but not executed; choose one of {', '.join(executable_schedules())}"
        )
    return entry


def executable_schedules() -> list[str]:
    """Names of the schedules that training has."""
    return [name for name, entry in SCHEDULES.items() if entry.execution is not None]


def settings_for(args: argparse.Namespace, plan: Plan | None, reason: str = "") -> ScheduleSettings:
    """Check that a plan can be executed by this job.

    Raises:
        ValueError: one line that says what does not fit.
    """
    execution = executable_schedule(args.pipeline_schedule).execution
    assert execution is not None
    if plan is not None:
        if execution is Execution.MEGATRON and not _is_megatrons(plan):
            # Megatron's functions would run their own order, whatever the plan says.
            execution = Execution.STAGES
        check_executable(plan, execution)
        tied = not args.untie_embeddings_and_output_weights
        if execution is Execution.STAGES and tied and not stages_follow_ranks(plan):
            raise ValueError(
                f"{args.pipeline_schedule} does not have stage r alone on rank r and needs separate weights "
                "for embedding and head; add --untie-embeddings-and-output-weights"
            )
        check_weight_gradients(args, splits_backward=plan.splits_backward)
    return ScheduleSettings(args.pipeline_schedule, execution, plan, reason, args.hardware)


def read_plan(args: argparse.Namespace) -> Plan:
    """The plan of ``--plan FILE``, validated; sets ``args.pipeline_schedule``.

    Raises:
        ValueError: one line: a file that is no plan, a plan that must not run or is not for this job, or an
            option that says what the plan says.
    """
    for name in _SAID_BY_PLAN:
        if getattr(args, name) is not None:
            raise ValueError(f"{flag_of(name)} does not apply with --plan FILE, which says it; remove it")
    path: Path = args.plan
    try:
        plan = Plan.from_json(path.read_text(encoding="utf-8"))
        if not find_schedule(plan.schedule).plans_ahead:
            raise ValueError(f"{plan.schedule} plans every batch anew")
        validate(plan)
        if not plan.is_lowered:
            plan = complete(plan)
        check_fits(
            plan,
            num_layers=args.num_layers,
            num_ranks=args.pipeline_model_parallel_size,
            num_microbatches=args.num_microbatches,
        )
        check_stages_fit(plan, _stage_layers(args, find_schedule(plan.schedule)))
    except OSError as error:
        raise ValueError(f"--plan {path}: cannot be read ({error.strerror}); give another path") from None
    except ValueError as error:
        # Errors of validation show operations on lines of their own.
        raise ValueError(f"--plan {path}: {' '.join(str(error).split())}") from None
    args.pipeline_schedule = plan.schedule
    return plan


def plan_request(
    args: argparse.Namespace, entry: Schedule, costs: KnownCosts | None = None
) -> ScheduleRequest:
    """What the schedule is asked for; an attention range that is yet to be chosen is left out.

    Raises:
        ValueError: virtual stages that do not fit, or another schedule's.
    """
    return ScheduleRequest(
        num_layers=args.num_layers,
        num_ranks=args.pipeline_model_parallel_size,
        num_microbatches=args.num_microbatches,
        layer_kinds=_layer_kinds(args) if "layer_kinds" in entry.options else None,
        stage_layers=_stage_layers(args, entry),
        # As in Megatron, it means nothing without virtual stages.
        microbatch_group=args.microbatch_group_size_per_virtual_pipeline_stage
        if "microbatch_group" in entry.options
        else None,
        num_fold=args.num_fold,
        num_slices=args.num_slices,
        virtual_stages=_virtual_stages(args, entry),
        attention_range=None if args.attention_range == AUTO else args.attention_range,
        head_placement=args.head_placement,
        round_order=args.round_order,
        split_weight_gradients=args.split_weight_gradients,
        resend_context=args.resend_context,
        costs=costs,
    )


def plan_ahead(args: argparse.Namespace, entry: Schedule, costs: KnownCosts | None = None) -> Plan | None:
    """The plan that the options ask for, its order fitted to costs; None where each batch has its own."""
    request = plan_request(args, entry, costs)
    return build_plan(args.pipeline_schedule, request) if entry.plans_ahead else None


def _layer_kinds(args: argparse.Namespace) -> tuple[str, ...] | None:
    """Layers that see, compute or keep more take other times, and need other names in the plan."""
    windows = windows_of_layers(args.window_size, args.window_attn_skip_freq, args.num_layers)
    levels = asked_levels(args)
    has_experts = experts_of_layers(args.moe_layer_freq, args.num_layers) if args.num_experts else ()
    told = (
        kinds_of_windows(windows),
        kinds_of_mlps(has_experts),
        [level.value for level in levels] if isinstance(levels, tuple) else [],
    )
    return join_kinds(*filter(None, told)) or None


def _stage_layers(args: argparse.Namespace, entry: Schedule) -> tuple[int, ...] | None:
    found = stage_layers_of(args)
    if found is None or (entry.execution is not None and entry.execution.cuts_layers):
        return None
    if "stage_layers" not in entry.options:
        users = ", ".join(name for name, other in SCHEDULES.items() if "stage_layers" in other.options)
        raise ValueError(
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers do not apply to "
            f"{args.pipeline_schedule}; remove them (they are for {users})"
        )
    return found


def _virtual_stages(args: argparse.Namespace, entry: Schedule) -> int | None:
    per_chunk, has_them = args.num_layers_per_virtual_pipeline_stage, "virtual_stages" in entry.options
    if per_chunk is not None and not has_them:
        users = ", ".join(name for name, other in SCHEDULES.items() if "virtual_stages" in other.options)
        raise ValueError(
            f"--num-layers-per-virtual-pipeline-stage does not apply to {args.pipeline_schedule}; remove it "
            f"(it is for {users})"
        )
    if not has_them:
        return None
    stages: int | None = None
    if per_chunk is not None:
        step = args.pipeline_model_parallel_size * per_chunk
        stages, rest = divmod(args.num_layers, step)
        if rest:
            raise ValueError(
                f"--num-layers {args.num_layers} must be a multiple of --pipeline-model-parallel-size x "
                f"--num-layers-per-virtual-pipeline-stage ({args.pipeline_model_parallel_size} x "
                f"{per_chunk}); use {nearest(args.num_layers, step)}"
            )
    if stages is None or stages == 1 or args.pipeline_model_parallel_size == 1:
        raise ValueError(
            f"{args.pipeline_schedule} needs two or more pipeline ranks and model chunks per rank; set "
            "--num-layers-per-virtual-pipeline-stage below --num-layers / --pipeline-model-parallel-size"
        )
    return stages


def _is_megatrons(plan: Plan) -> bool:
    """True if a plan is what its schedule says, as Megatron's functions run it."""
    entry = SCHEDULES[plan.schedule]
    options: dict[str, Any] = {
        name: plan.parameters[name] for name in entry.options if name in plan.parameters
    }
    if STAGE_LAYERS in options:
        options[STAGE_LAYERS] = parse_stage_layers(options[STAGE_LAYERS])
    request = ScheduleRequest(
        num_layers=int(plan.parameters["num_layers"]),
        num_ranks=plan.num_ranks,
        num_microbatches=plan.num_microbatches,
        **options,
    )
    try:
        own = entry.plan(request)
    except ValueError:
        return False
    return (own.placement, own.orders) == (plan.placement, plan.compute_only().orders)
