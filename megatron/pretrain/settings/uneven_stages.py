"""Stages with different numbers of layers, as Megatron's options say them."""

from __future__ import annotations

import argparse

from helixpipe.commands.parser import flag_of
from megatron.pretrain.settings.sizes import nearest

_ENDS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")


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


def needless_ends(args: argparse.Namespace) -> tuple[str, ...]:
    """The options that were given, for people, where layers are in no stages."""
    return tuple(f"{flag_of(name)} (layers are in no stages)" for name in _ENDS if getattr(args, name))
