"""``costs`` and ``advise``: predict before anything runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helixpipe.commands.job import add_workload_arguments, read_workload
from helixpipe.commands.planning import read_plan
from helixpipe.commands.ranges import GIBIBYTES, RANKS, Whole
from helixpipe.plan.advise import Advice, Job, advise, make_job, search
from helixpipe.plan.advise.job import RESERVED_GIB
from helixpipe.plan.cost_model import Hardware, Recompute, costs_of_plan, predict_pieces, with_predicted_ends
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.refusals import refuse

_ON_A_PAGE = 8


def add_parsers(add: Callable[..., Any]) -> None:
    """Add the commands' parsers."""
    costs = add("costs", help="predict what the operations of a plan cost")
    add_workload_arguments(costs)
    costs.add_argument("--plan", type=Path, required=True, help="plan.json")
    costs.add_argument(
        "--recompute", choices=[mode.value for mode in Recompute], default="none", help="in every layer"
    )
    costs.add_argument("--output", type=Path, required=True, help="costs.json")
    costs.add_argument(
        "--plan-output",
        type=Path,
        metavar="FILE",
        help="of a plan of slices: the plan with the ends of its slices, which the costs are for",
    )
    costs.set_defaults(run=_costs)

    advice = add("advise", help="rank every schedule that fits into memory")
    add_workload_arguments(advice)
    advice.add_argument("--pipeline-model-parallel-size", type=RANKS, help="ranks p")
    advice.add_argument("--num-microbatches", type=Whole(), help="per replica and iteration")
    advice.add_argument(
        "--gpus", type=RANKS, metavar="N", help="search all sizes for so many GPUs, in their place"
    )
    advice.add_argument("--global-batch-size", type=Whole(), help="with --gpus: sequences of an iteration")
    advice.add_argument(
        "--explain", type=Whole(), metavar="ROW", help="with --gpus: where a row's time and memory go"
    )
    advice.add_argument(
        "--memory-limit-gib",
        type=GIBIBYTES,
        help=f"of one GPU (default: the hardware's less {RESERVED_GIB:g} GiB)",
    )
    advice.add_argument(
        "--page",
        type=Path,
        metavar="HTML",
        help="also compare the best pipelines' timelines on a page; with --gpus, time against memory",
    )
    advice.set_defaults(run=_advise)


def _costs(args: argparse.Namespace) -> None:
    plan = read_plan(args.plan)
    machine, workload = read_workload(args)
    pieces = predict_pieces(workload, machine) if isinstance(machine, Hardware) else machine
    if args.plan_output is not None:
        if not plan.slices:
            raise ValueError(f"--plan-output is for plans of slices, not of {plan.schedule}; leave it out")
        plan = with_predicted_ends(pieces, plan)
    costs = costs_of_plan(pieces, plan, Recompute(args.recompute))
    args.output.write_text(costs.to_json() + "\n", encoding="utf-8")
    if args.plan_output is not None:
        args.plan_output.write_text(plan.to_json(), encoding="utf-8")
    print(f"Wrote {' and '.join(str(path) for path in (args.output, args.plan_output) if path)}")


def _advise(args: argparse.Namespace) -> None:
    # Only this command draws tables.
    from helixpipe.report.advice import print_advice

    if args.gpus is not None:
        _search(args)
        return
    refuse(
        {"--global-batch-size": args.global_batch_size, "--explain": args.explain},
        "{} belongs to --gpus; leave it out or add --gpus N",
    )
    for flag, value in (
        ("--pipeline-model-parallel-size", args.pipeline_model_parallel_size),
        ("--num-microbatches", args.num_microbatches),
    ):
        if value is None:
            raise ValueError(f"{flag} is missing; or search all sizes with --gpus and --global-batch-size")
    machine, workload = read_workload(args)
    job = make_job(
        machine,
        workload,
        num_ranks=args.pipeline_model_parallel_size,
        num_microbatches=args.num_microbatches,
        memory_limit_gib=args.memory_limit_gib,
    )
    found = advise(job)
    print_advice(found, job)
    if args.page:
        _write_page(found, job, args.page)


def _search(args: argparse.Namespace) -> None:
    """Advice on sizes and schedules together."""
    from helixpipe.report.joint_advice import print_joint_advice

    searched = {
        "--tensor-model-parallel-size": args.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size,
        "--data-parallel-size": args.data_parallel_size,
        "--expert-model-parallel-size": args.expert_model_parallel_size,
        "--micro-batch-size": args.micro_batch_size,
        "--num-microbatches": args.num_microbatches,
        "--use-distributed-optimizer": args.use_distributed_optimizer,
        "--no-sequence-parallel": args.no_sequence_parallel,
    }
    refuse(searched, "--gpus searches {}; leave it out")
    if args.global_batch_size is None:
        raise ValueError("--global-batch-size is missing; --gpus needs the sequences of an iteration")
    machine, workload = read_workload(args)
    found = search(
        machine,
        workload,
        num_gpus=args.gpus,
        global_batch=args.global_batch_size,
        memory_limit_gib=args.memory_limit_gib,
    )
    print_joint_advice(found, machine, args.explain)
    if args.page:
        # Only a page draws figures.
        from helixpipe.report.joint_page import write_joint_page

        title = f"{workload.model.name}, {workload.seq_length} tokens, {args.gpus} GPUs"
        write_joint_page(found, machine, args.page, title=title)
        print(f"Wrote {args.page}")


def _write_page(advice: Advice, job: Job, path: Path) -> None:
    from helixpipe.report.page import write_page
    from helixpipe.report.summary import LabelledTimeline

    entries: list[LabelledTimeline] = []
    for option in advice.options:
        if option.plan is None or len(entries) == _ON_A_PAGE:
            continue
        candidate = option.candidate
        pieces = job.pieces_for(candidate.micro_batch_size)
        assert pieces is not None
        simulation = simulate(
            option.plan,
            costs_of_plan(pieces, option.plan, candidate.levels(job.workload.model.num_layers)),
        )
        runs = f"no: {candidate.why_not_runnable}" if candidate.why_not_runnable else "yes"
        facts = {"recompute": candidate.recompute_label, "runs": runs}
        entries.append(LabelledTimeline(simulation.timeline, candidate.label, simulation.iteration_ms, facts))
    workload = job.workload
    write_page(
        entries,
        path,
        title=f"{workload.model.name}, {workload.seq_length} tokens, {job.num_gpus} GPUs",
        memory_limit_bytes=job.memory_limit_bytes,
    )
    print(f"Wrote {path}")
