"""``--attention-range auto``: which pieces of a layer the attention rank of helix runs."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from helixpipe.plan import Plan, build_plan
from helixpipe.plan.attention_range import AttentionSizes, cheapest_range
from helixpipe.plan.build import find_schedule
from helixpipe.plan.cost_model import costs_of_plan, with_predicted_ends
from helixpipe.plan.schedules.helix import DEFAULT_FOLD
from helixpipe.plan.schedules.request import ATTENTION_RANGES, ScheduleRequest
from helixpipe.plan.simulation.simulate import simulate
from megatron.pretrain.settings.recomputation import job_levels
from megatron.pretrain.settings.schedule_choice import known_machine, pieces_on, workload_of


def choose_range(args: argparse.Namespace, request: ScheduleRequest) -> tuple[Plan, str]:
    """The range with the shortest predicted iteration; on hardware that is not known, with the fewest bytes.

    Args:
        args: parsed and checked, the padded vocabulary size known; the schedule has attention ranges.
        request: of the plan but for the range.

    Returns:
        The plan with the range that was chosen, and a line that tells why. ``args.attention_range`` is set.
    """
    machine = known_machine(args.hardware, args.attention_backend)
    if machine is None:
        fold = args.num_fold or DEFAULT_FOLD
        slices = args.pipeline_model_parallel_size * fold if _is_sliced(args) else 1
        found = cheapest_range(_sizes(args, slices), fold)
        args.attention_range = found
        return (
            build_plan(args.pipeline_schedule, replace(request, attention_range=found)),
            f"attention range auto chose {found}: the smallest messages (--hardware would weigh time)",
        )
    pieces = pieces_on(machine, args.hardware, workload_of(args))
    recompute = job_levels(args)
    plans = {
        name: build_plan(args.pipeline_schedule, replace(request, attention_range=name))
        for name in ATTENTION_RANGES
    }
    times = {}
    for name, plan in plans.items():
        cut = with_predicted_ends(pieces, plan) if plan.slices else plan
        times[name] = simulate(cut, costs_of_plan(pieces, cut, recompute)).iteration_ms
    found = min(times, key=lambda name: times[name])
    told = ", ".join(f"{name} {ms:.4g}" for name, ms in times.items())
    args.attention_range = found
    return plans[found], f"attention range auto chose {found}: predicted ms per iteration: {told}"


def _is_sliced(args: argparse.Namespace) -> bool:
    execution = find_schedule(args.pipeline_schedule).execution
    return execution is not None and execution.has_slices


def _sizes(args: argparse.Namespace, slices: int) -> AttentionSizes:
    """Of a micro batch of the plan: a sequence, or one of so many slices of it on average."""
    tp, groups = args.tensor_model_parallel_size, args.num_query_groups
    tokens = args.micro_batch_size * args.seq_length // slices
    return AttentionSizes(
        tokens=tokens,
        residual_tokens=tokens // tp if args.sequence_parallel else tokens,
        hidden_size=args.hidden_size,
        query_size=args.num_attention_heads // tp * args.kv_channels,
        kv_size=max(groups // tp, 1) * args.kv_channels,
        element_bytes=args.params_dtype.itemsize,
        # As the model is wrapped: gradients are added up in fp32.
        gradient_bytes=torch.float32.itemsize,
    )
