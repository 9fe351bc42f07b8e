"""``plan``, ``simulate`` and ``draw``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from helixpipe.commands.parser import argument
from helixpipe.commands.ranges import LAYERS, RANKS, Real, Whole
from helixpipe.commands.terminal import prints
from helixpipe.plan import Plan, ScheduleRequest, build_plan, validate
from helixpipe.plan.schedules import planned_ahead
from helixpipe.plan.schedules.request import ATTENTION_RANGES, HEAD_PLACEMENTS, ROUND_ORDERS, KnownCosts
from helixpipe.plan.simulation.costs import Costs, parse_costs, uniform_costs
from helixpipe.plan.simulation.simulate import simulate
from helixpipe.plan.simulation.timeline import Timeline
from helixpipe.plan.stage_layers import parse_stage_layers
from helixpipe.report.summary import LabelledTimeline

_SUFFIXES = (".png", ".svg", ".html", ".json")


def add_parsers(add: Callable[..., Any]) -> None:
    """Add the commands' parsers."""
    _add_plan(add("plan", help="make a plan, check it and write it"))
    simulation = add("simulate", help="run a plan against a clock")
    simulation.add_argument("--plan", type=Path, required=True, help="plan.json")
    simulation.add_argument("--costs", type=Path, required=True, help="costs.json")
    simulation.add_argument("--output", type=Path, help="result.json (default: print it)")
    simulation.set_defaults(run=_simulate)
    _add_draw(add("draw", help="show a plan or a measured timeline"))


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--schedule", required=True, metavar="{" + ",".join(planned_ahead()) + "}")
    plan.add_argument("--num-layers", type=LAYERS, required=True, help="transformer layers L")
    plan.add_argument("--pipeline-model-parallel-size", type=RANKS, required=True, help="ranks p")
    plan.add_argument(
        "--num-microbatches",
        type=Whole(),
        required=True,
        help="micro batches m per iteration; for schedules that slice, sequences",
    )
    _add_schedule_options(plan)
    plan.add_argument("--compute-only", action="store_true", help="leave the messages out")
    plan.add_argument("--output", type=Path, required=True, help="plan.json")
    plan.add_argument("--csv", type=Path, help="also write the orders, one row per rank")
    plan.set_defaults(run=_plan)


def _add_schedule_options(plan: argparse.ArgumentParser) -> None:
    """What some schedules have, and others refuse."""
    plan.add_argument(
        "--num-fold", type=Whole(), help="helix, sliced-helix: micro batches or slices per slot (default 2)"
    )
    plan.add_argument("--virtual-stages", type=Whole(), help="interleaved: chunks per rank (default 2)")
    plan.add_argument(
        "--microbatch-group",
        type=Whole(),
        help="interleaved: micro batches through a chunk before the next one's turn (default: as ranks)",
    )
    plan.add_argument(
        "--stage-layers",
        type=argument(parse_stage_layers),
        metavar="N,…",
        help="1f1b, gpipe, zb-h1: layers of each stage, where they differ (2,4,4,2)",
    )
    plan.add_argument("--num-slices", type=Whole(), help="seq1f1b: slices per sequence (default 4)")
    plan.add_argument(
        "--attention-range",
        metavar="{" + ",".join(ATTENTION_RANGES) + "}",
        help="helix, sliced-helix: pieces on the attention rank: attention alone, norm1 to attention, norm1 "
        "to the projection (default core)",
    )
    plan.add_argument(
        "--head-placement",
        metavar="{" + ",".join(HEAD_PLACEMENTS) + "}",
        help="helix, sliced-helix: ranks that run the head (default first)",
    )
    plan.add_argument(
        "--round-order",
        metavar="{" + ",".join(ROUND_ORDERS) + "}",
        help="helix: rounds one after the other, or forwards of one among backwards of the one before "
        "(default filo)",
    )
    plan.add_argument(
        "--split-weight-gradients",
        action="store_true",
        default=None,
        help="helix, interlocked: weight gradients are operations of their own, which fill gaps",
    )
    plan.add_argument(
        "--costs", type=Path, help="helix, interlocked: costs.json, to fit the order to (default: none known)"
    )
    plan.add_argument(
        "--layer-kinds",
        metavar="KIND,…",
        help="helix: kinds of layers that differ in cost, repeated over the layers; costs.json names them "
        "(window,window,full)",
    )
    plan.add_argument(
        "--resend-context",
        action="store_true",
        default=None,
        help="sliced-helix: lend keys and values of earlier slices again for the backward pass, instead of "
        "keeping them",
    )


def _add_draw(draw: argparse.ArgumentParser) -> None:
    source = draw.add_mutually_exclusive_group(required=True)
    source.add_argument("--plan", type=Path, nargs="+", help="plan.json, or several")
    source.add_argument(
        "--timeline", type=Path, nargs="+", help="timeline.json as training writes it, or several"
    )
    draw.add_argument(
        "--costs", type=Path, nargs="+", help="with --plan: a costs.json for each (default: F=1, B=2, W=1)"
    )
    draw.add_argument(
        "--output",
        type=Path,
        help=".png or .svg picture, .html page, or .json for ui.perfetto.dev (default: text in the terminal)",
    )
    draw.add_argument("--title", help="heading of the picture")
    draw.add_argument(
        "--until",
        type=Real(above=0.0),
        metavar="MS",
        help="end of the picture's time axis, to compare pictures",
    )
    draw.add_argument("--memory", action="store_true", help="add memory over time to the picture")
    draw.set_defaults(run=_draw)


def _plan(args: argparse.Namespace) -> None:
    request = ScheduleRequest(
        num_layers=args.num_layers,
        num_ranks=args.pipeline_model_parallel_size,
        num_microbatches=args.num_microbatches,
        num_fold=args.num_fold,
        virtual_stages=args.virtual_stages,
        num_slices=args.num_slices,
        attention_range=args.attention_range,
        head_placement=args.head_placement,
        round_order=args.round_order,
        split_weight_gradients=args.split_weight_gradients,
        costs=_known_costs(args.costs),
        layer_kinds=_layer_kinds(args.layer_kinds, args.num_layers),
        resend_context=args.resend_context,
        stage_layers=args.stage_layers,
        microbatch_group=args.microbatch_group,
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


def _layer_kinds(pattern: str | None, num_layers: int) -> tuple[str, ...] | None:
    return None if pattern is None else tuple(islice(cycle(pattern.split(",")), num_layers))


def _known_costs(path: Path | None) -> KnownCosts | None:
    if path is None:
        return None
    text = read_text(path)
    return KnownCosts(lambda plan: parse_costs(text, plan))


def _simulate(args: argparse.Namespace) -> None:
    plan = read_plan(args.plan)
    result = simulate(plan, parse_costs(read_text(args.costs), plan))
    if args.output:
        args.output.write_text(result.to_json() + "\n", encoding="utf-8")
    else:
        print(result.to_json())


def _draw(args: argparse.Namespace) -> None:
    # Matplotlib takes a second to import: only this command pays for it.
    from helixpipe.report.page import write_page
    from helixpipe.report.perfetto import write_perfetto
    from helixpipe.report.picture import draw_timeline, draw_timelines
    from helixpipe.report.text import ASCII, UNICODE, text_grid

    entries = _labelled_timelines(args)
    timelines = [entry.timeline for entry in entries]
    suffix = args.output.suffix.lower() if args.output else None
    if suffix not in (None, *_SUFFIXES):
        raise ValueError(f"cannot draw {args.output}: the name must end in {', '.join(_SUFFIXES)}")
    if suffix not in (".png", ".svg") and (args.until is not None or args.memory):
        raise ValueError("--until and --memory are for pictures; add --output picture.png or picture.svg")
    if suffix is None and args.title is not None:
        raise ValueError("--title is for pictures; add --output picture.png, picture.svg or page.html")
    if suffix == ".html":
        write_page(entries, args.output, title=args.title or "Schedules")
    elif suffix == ".json":
        write_perfetto(timelines, args.output)
    elif suffix is None:
        glyphs = UNICODE if prints("".join(UNICODE)) else ASCII
        print("\n\n".join(text_grid(timeline, glyphs=glyphs) for timeline in timelines))
        return
    elif len(timelines) > 1:
        if args.title is not None or args.memory:
            raise ValueError("--title and --memory are for a picture of one timeline, or for page.html")
        draw_timelines(timelines, args.output, until_ms=args.until)
    else:
        draw_timeline(timelines[0], args.output, title=args.title, until_ms=args.until, memory=args.memory)
    print(f"Wrote {args.output}")


def _labelled_timelines(args: argparse.Namespace) -> list[LabelledTimeline]:
    if not args.plan:
        if args.costs:
            raise ValueError("--costs goes with --plan; a measured timeline has its own times")
        return [LabelledTimeline(Timeline.from_json(read_text(path))) for path in args.timeline]
    if args.costs and len(args.costs) != len(args.plan):
        raise ValueError(f"{len(args.plan)} plans but {len(args.costs)} costs; give one for each plan")
    entries = []
    for number, path in enumerate(args.plan):
        plan = read_plan(path)
        costs = _costs(args.costs[number], plan) if args.costs else _drawing_costs(plan)
        simulation = simulate(plan, costs)
        timeline = replace(simulation.timeline, source=f"{plan.schedule}, predicted")
        entries.append(
            LabelledTimeline(timeline, iteration_ms=simulation.iteration_ms if costs.ranks else None)
        )
    return entries


def _costs(path: Path, plan: Plan) -> Costs:
    return parse_costs(read_text(path), plan)


def _drawing_costs(plan: Plan) -> Costs:
    """F=1 and a whole backward of 2, so that schedules with and without W compare."""
    return uniform_costs(plan, 1.0, 1.0, 1.0)


def read_plan(path: Path) -> Plan:
    """A plan that holds."""
    try:
        plan = Plan.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a plan: not a text file") from None
    validate(plan)
    return plan


def read_text(path: Path) -> str:
    """The text in a file; ``ValueError`` if it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None
