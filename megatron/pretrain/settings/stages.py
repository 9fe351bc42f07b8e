"""Options of stages: how many there are on a rank, and how many layers each has."""

from __future__ import annotations

import argparse

from helixpipe.commands.parser import flag_of
from helixpipe.commands.ranges import LAYERS, Whole
from helixpipe.plan.schedules import SCHEDULES
from megatron.pretrain.settings.sizes import nearest

_ENDS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of arguments."""
    add = parser.add_argument_group("stages").add_argument
    add("--num-layers-per-virtual-pipeline-stage", type=LAYERS, help="interleaved: layers per model chunk")
    add(
        "--microbatch-group-size-per-virtual-pipeline-stage",
        type=Whole(),
        metavar="N",
        help="interleaved: micro batches through a model chunk before the next one's turn (default: as many "
        "as pipeline ranks)",
    )
    add(
        "--decoder-first-pipeline-num-layers",
        type=LAYERS,
        metavar="N",
        help="1f1b, gpipe, zb-h1, elastic: layers of the first stage (default: as many as the others; helix "
        "has no stages of layers)",
    )
    add("--decoder-last-pipeline-num-layers", type=LAYERS, metavar="N", help="the same of the last stage")


def stage_layers_of(args: argparse.Namespace) -> tuple[int, ...] | None:
    """Layers of each pipeline rank; None where no option says that they differ.

    Stages whose layers are not given share the rest evenly.

    Raises:
        ValueError: numbers that do not fit; the message says which would.
    """
    ends = {name: getattr(args, name) for name in _ENDS if getattr(args, name) is not None}
    if not ends:
        return None
    given = " and ".join(f"{flag_of(name)} {count}" for name, count in ends.items())
    ranks, layers, taken = args.pipeline_model_parallel_size, args.num_layers, sum(ends.values())
    if ranks == 1:
        raise ValueError(f"{given} needs --pipeline-model-parallel-size of 2 or more")
    between, rest = ranks - len(ends), layers - taken
    if between == 0 and rest:
        raise ValueError(f"{given} are {taken} layers of --num-layers {layers}; let them add up to it")
    if between and (rest < between or rest % between):
        fitting = nearest(max(rest, between), between).split(" or ")
        raise ValueError(
            f"{given} leaves {rest} of --num-layers {layers} for {between} other stages; use --num-layers "
            f"{' or '.join(str(taken + int(count)) for count in fitting)}"
        )
    counts = [rest // between if between else 0] * ranks
    first, last = (ends.get(name) for name in _ENDS)
    counts[0], counts[-1] = first or counts[0], last or counts[-1]
    return tuple(counts)


def needless_of_stages(args: argparse.Namespace) -> tuple[str, ...]:
    """Options of stages that the job's schedule does not have, for people."""
    entry, group = SCHEDULES[args.pipeline_schedule], "microbatch_group_size_per_virtual_pipeline_stage"
    found = []
    if entry.execution is not None and entry.execution.cuts_layers:
        found += [f"{flag_of(name)} (layers are in no stages)" for name in _ENDS if getattr(args, name)]
    if getattr(args, group) and "microbatch_group" not in entry.options:
        found.append(f"{flag_of(group)} (there are no virtual stages)")
    return tuple(found)
