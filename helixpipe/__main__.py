"""Command line: ``python -m helixpipe {plan,simulate,draw}``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from helixpipe.plan import Plan, ScheduleRequest, build_plan, validate
from helixpipe.plan.costs import parse_costs, uniform_costs
from helixpipe.plan.schedules import SCHEDULES
from helixpipe.plan.schedules.request import ATTENTION_RANGES
from helixpipe.plan.simulate import simulate
from helixpipe.plan.timeline import Timeline

EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it succeeded, 2 with one line on stderr if the input was wrong."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"helixpipe {args.command}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="helixpipe", description="Plan and look at pipeline schedules.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", help="make a plan, check it and write it")
    plan.add_argument("--schedule", required=True, metavar="{" + ",".join(SCHEDULES) + "}")
    plan.add_argument("--num-layers", type=int, required=True, help="transformer layers L")
    plan.add_argument("--pipeline-model-parallel-size", type=int, required=True, help="ranks p")
    plan.add_argument("--num-microbatches", type=int, required=True, help="micro batches m per iteration")
    plan.add_argument("--num-fold", type=int, help="helix: micro batches per slot (default 2)")
    plan.add_argument("--virtual-stages", type=int, help="interleaved: chunks per rank (default 2)")
    plan.add_argument(
        "--attention-range",
        metavar="{" + ",".join(ATTENTION_RANGES) + "}",
        help="helix: pieces on the attention rank (default core)",
    )
    plan.add_argument("--compute-only", action="store_true", help="leave the messages out")
    plan.add_argument("--output", type=Path, required=True, help="plan.json")
    plan.add_argument("--csv", type=Path, help="also write the orders, one row per rank")
    plan.set_defaults(run=_plan)

    simulation = commands.add_parser("simulate", help="run a plan against a clock")
    simulation.add_argument("--plan", type=Path, required=True, help="plan.json")
    simulation.add_argument("--costs", type=Path, required=True, help="costs.json")
    simulation.add_argument("--output", type=Path, help="result.json (default: print it)")
    simulation.set_defaults(run=_simulate)

    draw = commands.add_parser("draw", help="show a plan or a measured timeline")
    source = draw.add_mutually_exclusive_group(required=True)
    source.add_argument("--plan", type=Path, help="plan.json")
    source.add_argument("--timeline", type=Path, help="timeline.json, as training writes it")
    draw.add_argument("--costs", type=Path, help="with --plan: costs.json (default: F=1, B=2 everywhere)")
    draw.add_argument("--output", type=Path, help=".png or .svg (default: text in the terminal)")
    draw.add_argument("--title", help="heading of the picture")
    draw.add_argument(
        "--until", type=float, metavar="MS", help="end of the picture's time axis, to compare pictures"
    )
    draw.set_defaults(run=_draw)
    return parser


def _plan(args: argparse.Namespace) -> None:
    request = ScheduleRequest(
        num_layers=args.num_layers,
        num_ranks=args.pipeline_model_parallel_size,
        num_microbatches=args.num_microbatches,
        num_fold=args.num_fold,
        virtual_stages=args.virtual_stages,
        attention_range=args.attention_range,
    )
    plan = build_plan(args.schedule, request, compute_only=args.compute_only)
    args.output.write_text(plan.to_json(), encoding="utf-8")
    if args.csv:
        args.csv.write_text(plan.to_csv(), encoding="utf-8")
    operations = sum(len(order) for order in plan.orders)
    print(
        f"{plan.schedule}: {plan.num_ranks} ranks, {plan.num_segments} segments, "
        f"{plan.num_microbatches} micro batches, {operations} operations; valid. Wrote {args.output}"
    )


def _simulate(args: argparse.Namespace) -> None:
    plan = _read_plan(args.plan)
    result = simulate(plan, parse_costs(args.costs.read_text(encoding="utf-8"), plan))
    if args.output:
        args.output.write_text(result.to_json() + "\n", encoding="utf-8")
    else:
        print(result.to_json())


def _draw(args: argparse.Namespace) -> None:
    # Matplotlib takes a second to import: only this command pays for it.
    from helixpipe.report import draw_timeline, text_grid

    if args.plan:
        plan = _read_plan(args.plan)
        costs = (
            parse_costs(args.costs.read_text(encoding="utf-8"), plan) if args.costs else uniform_costs(plan)
        )
        timeline = replace(simulate(plan, costs).timeline, source=f"{plan.schedule}, predicted")
    elif args.costs:
        raise ValueError("--costs goes with --plan; a measured timeline has its own times")
    else:
        timeline = Timeline.from_json(args.timeline.read_text(encoding="utf-8"))
    if args.output:
        draw_timeline(timeline, args.output, title=args.title, until_ms=args.until)
        print(f"Wrote {args.output}")
    elif args.title is not None or args.until is not None:
        raise ValueError("--title and --until are for pictures; add --output picture.png or picture.svg")
    else:
        print(text_grid(timeline))


def _read_plan(path: Path) -> Plan:
    try:
        plan = Plan.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a plan: not a text file") from None
    validate(plan)
    return plan


if __name__ == "__main__":
    sys.exit(main())
