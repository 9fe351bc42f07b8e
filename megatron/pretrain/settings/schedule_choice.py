"""``--pipeline-schedule auto``: let the planner choose among the schedules that can be executed."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from helixpipe.commands.parser import flag_of
from helixpipe.plan.advise import Advice, Candidate, advise, is_for_one_rank, make_job, read_machine
from helixpipe.plan.advise.layouts import shared_pieces
from helixpipe.plan.build import complete
from helixpipe.plan.cost_model import (
    HARDWARE,
    Hardware,
    Pieces,
    Workload,
    costs_of_plan,
    predict_pieces,
)
from helixpipe.plan.cost_model.levels import spell_levels
from helixpipe.plan.cost_model.model import model_from_arguments
from helixpipe.plan.plan import Plan
from helixpipe.plan.schedules import SCHEDULES
from helixpipe.plan.schedules.request import KnownCosts
from helixpipe.refusals import refuse
from megatron.pretrain.settings.recomputation import BY_GRANULARITY, asked_levels, job_levels, mlp_chunk_size
from megatron.pretrain.settings.schedule import AUTO
from megatron.pretrain.settings.schedule_limits import check_execution, check_sinks, check_weight_gradients

# What a user may ask for of the schedule that is to be chosen.
_NARROWING = (
    "num_fold", "num_slices", "attention_range", "head_placement", "round_order", "split_weight_gradients",
    "resend_context", "num_layers_per_virtual_pipeline_stage", "recompute_levels", "recompute_granularity",
    "recompute_without_attention",
)  # fmt: skip

# What does not change the times of a layer.
_OF_NO_LAYER = (
    "model", "name", "num_layers", "other_parameters", "data_parallel", "distributed_optimizer",
    "whole_logits", "mlp_chunk_size",
)  # fmt: skip


def choose_schedule(args: argparse.Namespace) -> tuple[Plan, str]:
    """Put the fastest schedule that fits, with its options, in the place of ``auto``.

    Sizes, micro batches and recomputation, if any is asked for, stay as given, and so do options of
    schedules, which then leave only the schedules that have them. Every rank comes to the same choice by
    itself.

    Args:
        args: parsed and checked but for the schedule, the padded vocabulary size known.

    Returns:
        The plan that was chosen, with its messages, and a line that tells what was predicted for it.

    Raises:
        ValueError: hardware that is not known or was not measured for these sizes, or nothing that fits.
    """
    machine = known_machine(args.hardware, args.attention_backend)
    if machine is None:
        raise ValueError(
            "--pipeline-schedule auto needs --hardware: "
            f"{', '.join(HARDWARE)}, a file of rates, or a profile (python -m helixpipe profile)"
        )
    if isinstance(asked_levels(args), tuple):
        raise ValueError(
            f"--recompute-levels {args.recompute_levels} goes with a schedule that is named; auto chooses "
            "the level of each layer, or give one for all"
        )
    _check_stages(args)
    workload = workload_of(args)
    if isinstance(machine, Pieces):
        _check_profile(args.hardware, machine, workload)
    job = make_job(
        machine,
        workload,
        num_ranks=args.pipeline_model_parallel_size,
        num_microbatches=args.num_microbatches,
        memory_limit_gib=args.memory_limit_gib,
    )
    advice = advise(job, accept=lambda candidate: _is_allowed(args, candidate))
    if advice.best is None:
        raise ValueError(_why_nothing(args, advice))
    best = advice.best
    _apply(args, best.candidate)
    assert best.plan is not None, "what can be executed has a plan"
    return (
        complete(best.plan, best.costs),
        f"auto chose {best.candidate.label}: predicted {best.iteration_ms:.0f} ms per iteration, "
        f"{best.peak_bytes / 2**30:.1f} GiB on the worst rank",
    )


def _check_stages(args: argparse.Namespace) -> None:
    """``ValueError`` for what only a schedule that is named can have, and would be passed over in silence."""
    stages = (
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "microbatch_group_size_per_virtual_pipeline_stage",
    )
    refuse(
        {flag_of(name): getattr(args, name) is not None for name in stages},
        f"{{}} does not apply to --pipeline-schedule {AUTO}; remove it, or name a schedule",
    )


def _why_nothing(args: argparse.Namespace, advice: Advice) -> str:
    if advice.rejections:
        reasons = "; ".join(f"{r.candidate.label}: {r.reason}" for r in advice.rejections)
        return f"--pipeline-schedule {AUTO}: nothing can be executed within memory ({reasons})"
    given = [name for name in _NARROWING if getattr(args, name) not in (None, AUTO)]
    told = ", ".join(map(flag_of, given)) or "these options"
    return (
        f"--pipeline-schedule {AUTO}: no schedule that it plans can be executed with all of {told}; leave "
        "some out, or name a schedule"
    )


def known_machine(hardware: str | None, attention_backend: str) -> Hardware | Pieces | None:
    """What ``--hardware`` names, else the preset of this GPU if there is one; with a backend's attention.

    A backend without a published rate on a machine is taken for the fastest that has one.
    """
    machine = _this_gpu() if hardware is None else read_machine(hardware)
    if isinstance(machine, Hardware) and machine.has_attention(attention_backend):
        return machine.with_attention(attention_backend)
    return machine


def _this_gpu() -> Hardware | None:
    # Like "NVIDIA H100 80GB HBM3": h20 must not be found in h200.
    words = torch.cuda.get_device_name().lower().split() if torch.cuda.is_available() else []
    return next((machine for name, machine in HARDWARE.items() if name in words), None)


def workload_of(args: argparse.Namespace) -> Workload:
    """The model, its sizes and how it is cut, for the cost model."""
    return Workload(
        model=model_from_arguments("the model", vars(args)),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        tensor_parallel=args.tensor_model_parallel_size,
        # Without tensor parallelism there is nothing to cut.
        sequence_parallel=args.sequence_parallel or args.tensor_model_parallel_size == 1,
        context_parallel=args.context_parallel_size,
        # Of all ranks, while a rank attends to its own.
        gathers_keys=args.context_parallel_size > 1,
        data_parallel=args.data_parallel_size,
        expert_parallel=args.expert_model_parallel_size,
        distributed_optimizer=args.use_distributed_optimizer,
        whole_logits=args.loss_chunk_size is None,
        mlp_chunk_size=mlp_chunk_size(args),
        element_bytes=args.params_dtype.itemsize,
    )


def known_costs(args: argparse.Namespace) -> KnownCosts | None:
    """What an interlocked order is fitted to; None for other orders, and on hardware that is not known.

    Raises:
        ValueError: hardware that is not known or was not measured for these sizes.
    """
    workload = workload_of(args)
    is_fitted = args.round_order == "interlocked" and is_predicted(workload)
    machine = known_machine(args.hardware, args.attention_backend) if is_fitted else None
    if machine is None:
        return None
    pieces = pieces_on(machine, args.hardware, workload)
    recompute = job_levels(args)
    limit_gib = args.memory_limit_gib
    return KnownCosts(
        lambda plan: costs_of_plan(pieces, plan, recompute),
        None if limit_gib is None else int(limit_gib * 2**30),
    )


def is_predicted(workload: Workload) -> bool:
    """False for experts that only ranks which share a sequence are enough to share."""
    return workload.tensor_parallel * workload.data_parallel % workload.expert_parallel == 0


def pieces_on(machine: Hardware | Pieces, name: str | None, workload: Workload) -> Pieces:
    """What the pieces of a job's layers take: as they were measured, or predicted.

    Args:
        machine: see :func:`known_machine`.
        name: as it was given, for messages.
        workload: of the job.

    Raises:
        ValueError: it was measured for other sizes, or ranks share sequences, of which it tells nothing.
    """
    if workload.context_parallel > 1:
        if isinstance(machine, Pieces):
            raise ValueError(
                f"{name} is a profile, which tells nothing about sequences that ranks share; name a machine"
            )
        return shared_pieces(machine, workload)
    if isinstance(machine, Pieces):
        _check_profile(name, machine, workload)
        return replace(machine, workload=workload)
    return predict_pieces(workload, machine)


def _check_profile(hardware: str | None, profile: Pieces, workload: Workload) -> None:
    """A profile holds for the sizes it was measured with; depth, names and replicas do not change a layer.

    Raises:
        ValueError: the job's are others.
    """

    def sizes(of: Workload) -> dict[str, object]:
        found = {**vars(of), **vars(of.model)}
        padding = 128 * of.tensor_parallel
        found["vocab_size"] = -(-of.model.vocab_size // padding) * padding
        for name in _OF_NO_LAYER:
            del found[name]
        return found

    measured, wanted = sizes(profile.workload), sizes(workload)
    for name, value in wanted.items():
        if measured[name] != value:
            raise ValueError(
                f"--hardware {hardware} was measured with {name.replace('_', ' ')} {measured[name]}, "
                f"this job has {value}; profile again with the job's sizes"
            )


def _recomputes_as_asked(args: argparse.Namespace, candidate: Candidate) -> bool:
    """Without a word, as much is computed again as memory needs, in as many layers."""
    if args.recompute_granularity is not None:
        return candidate.recompute is BY_GRANULARITY[args.recompute_granularity]
    levels = asked_levels(args)
    if levels is None:
        return candidate.has_our_levels
    return candidate.lighter is None and candidate.recompute is levels


def _is_allowed(args: argparse.Namespace, candidate: Candidate) -> bool:
    attention_range = None if args.attention_range == AUTO else args.attention_range
    given = {
        "num_fold": args.num_fold,
        "num_slices": args.num_slices,
        "attention_range": attention_range,
    }
    per_chunk = args.num_layers_per_virtual_pipeline_stage
    if per_chunk is not None:
        stages = args.pipeline_model_parallel_size * per_chunk
        given["virtual_stages"] = args.num_layers // stages
    return (
        not candidate.why_not_runnable
        and _goes_with_job(args, candidate)
        and _recomputes_as_asked(args, candidate)
        and candidate.micro_batch_size == args.micro_batch_size
        and args.head_placement in (None, _head_placement(candidate))
        and args.round_order in (None, candidate.options.get("round_order", "filo"))
        and args.split_weight_gradients in (None, candidate.options.get("split_weight_gradients"))
        and args.resend_context in (None, candidate.options.get("resend_context"))
        and all(candidate.options.get(name) == value for name, value in given.items() if value is not None)
        and (args.pipeline_model_parallel_size > 1 or is_for_one_rank(candidate.schedule))
    )


def _goes_with_job(args: argparse.Namespace, candidate: Candidate) -> bool:
    """Whether the checks of a schedule that is named would let this one pass."""
    execution = SCHEDULES[candidate.schedule].execution
    named = argparse.Namespace(**{**vars(args), "pipeline_schedule": candidate.schedule})
    attention_range = candidate.options.get("attention_range")
    try:
        check_execution(named, execution)
        check_sinks(named, execution, None if attention_range is None else str(attention_range))
        check_weight_gradients(named, splits_backward=candidate.splits_backward)
    except ValueError:
        return False
    return True


def _head_placement(candidate: Candidate) -> str | None:
    """Where a candidate has its head, None if it has no choice."""
    if "head_placement" not in SCHEDULES[candidate.schedule].options:
        return None
    return str(candidate.options.get("head_placement", "first"))


def _apply(args: argparse.Namespace, candidate: Candidate) -> None:
    args.pipeline_schedule = candidate.schedule
    args.recompute_without_attention = args.recompute_levels = None
    if candidate.has_our_levels:
        levels = candidate.levels(args.num_layers) if candidate.lighter else candidate.recompute
        args.recompute_levels = spell_levels(levels)
    options = dict(candidate.options)
    if args.attention_range == AUTO:
        args.attention_range = None  # the candidate's, if it has one
    virtual_stages = options.pop("virtual_stages", None)
    if virtual_stages is not None:
        stages = args.pipeline_model_parallel_size * int(virtual_stages)
        args.num_layers_per_virtual_pipeline_stage = args.num_layers // stages
    for name, value in options.items():
        setattr(args, name, value)
