"""Options for the positions of tokens: learned or rotary, and how rotary ones are scaled."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from helixpipe.commands.parser import argument, flag_of
from helixpipe.commands.ranges import Real, Whole
from helixpipe.layers.rotary import POSITIONS
from helixpipe.plan.windows import parse_skip_frequency

# Megatron's defaults
ROTARY_BASE = 10000
ROPE_SCALING_FACTOR = 8.0
# Of YaRN's paper
BETAS_OF_YARN = {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}


def add_position_arguments(add: Callable[..., Any]) -> None:
    """Add them, by a group's ``add_argument``."""
    add("--position-embedding-type", choices=POSITIONS, default="learned_absolute")
    add("--rotary-base", type=Whole(least=2), default=ROTARY_BASE)
    add("--rotary-base-local", type=Whole(least=2), help="of layers with windows (default: --rotary-base)")
    add(
        "--no-rope-freq",
        type=argument(parse_skip_frequency),
        metavar="N",
        help="every Nth layer has no rotary positions; or 1 for none or 0 for each layer, like [0,0,1] "
        "(default: all layers have them)",
    )
    add("--rotary-percent", type=Real(above=0.0, most=1.0), default=1.0)
    add("--rotary-seq-len-interpolation-factor", type=Real(least=1.0))
    add("--rotary-scaling-factor", type=Real(least=1.0), help="of yarn: how much longer sequences may be")
    add("--yarn-original-max-position-embeddings", type=Whole(), help="longest sequence before YaRN")
    add(
        "--yarn-beta-fast",
        type=Real(above=0.0),
        help="turns above which channels stay as they are (default 32)",
    )
    add("--yarn-beta-slow", type=Real(above=0.0), help="turns below which they are interpolated (default 1)")
    add(
        "--yarn-correction-range-round-to-int",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="both bounds are whole channels (default; not so in gpt-oss)",
    )
    add("--use-rope-scaling", action="store_true", help="rotary positions as in Llama 3.1 and later")
    add("--rope-scaling-factor", type=Real(least=1.0), default=ROPE_SCALING_FACTOR, help="of it (default 8)")


def check_positions(args: argparse.Namespace) -> None:
    """Set what was left out, and check that the options go together.

    Rotary embeddings turn pairs of channels, as many as the percentage leaves of a head, rounded down.

    Raises:
        ValueError: options that do not; the message says what would.
    """
    if args.rope_scaling_factor != ROPE_SCALING_FACTOR and not args.use_rope_scaling:
        raise ValueError("--rope-scaling-factor needs --use-rope-scaling; add it, or leave the factor out")
    _check_yarn(args)
    _check_layers_without(args)
    if args.position_embedding_type not in ("rope", "yarn"):
        for flag, is_given in (
            ("--rotary-percent", args.rotary_percent != 1.0),
            ("--rotary-base", args.rotary_base != ROTARY_BASE),
            ("--rotary-seq-len-interpolation-factor", args.rotary_seq_len_interpolation_factor is not None),
            ("--use-rope-scaling", args.use_rope_scaling),
            ("--rotary-base-local", args.rotary_base_local is not None),
            ("--no-rope-freq", args.no_rope_freq is not None),
        ):
            if is_given:
                raise ValueError(f"{flag} needs --position-embedding-type rope; add it, or leave {flag} out")
        return
    if args.kv_channels < 2:
        raise ValueError("--kv-channels 1 has no pair of channels for --position-embedding-type rope; use 2")
    channels = int(args.kv_channels * args.rotary_percent)
    if channels < 2 or channels % 2:
        # Rounded up, so that rounding the channels down finds the even number again.
        share = math.ceil(1e6 * max(channels - channels % 2, 2) / args.kv_channels) / 1e6
        raise ValueError(
            f"--rotary-percent {args.rotary_percent:g} of --kv-channels {args.kv_channels} leaves {channels} "
            f"channels to rotate, which must be an even number above 0; use {share:g}"
        )


def _check_layers_without(args: argparse.Namespace) -> None:
    """``--no-rope-freq`` names layers of this model."""
    found = args.no_rope_freq
    if isinstance(found, int) and args.num_layers % found:
        raise ValueError(
            f"--no-rope-freq {found} must divide --num-layers {args.num_layers}; give 1 or 0 for each layer"
        )
    if isinstance(found, tuple) and len(found) != args.num_layers:
        raise ValueError(
            f"--no-rope-freq has {len(found)} layers, and --num-layers is {args.num_layers}; give one number "
            "for each"
        )


def _check_yarn(args: argparse.Namespace) -> None:
    """YaRN needs its factor and the length before; what is left out gets the values of its paper."""
    needed = ("rotary_scaling_factor", "yarn_original_max_position_embeddings")
    if args.position_embedding_type != "yarn":
        for name in (*needed, *BETAS_OF_YARN):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"{flag_of(name)} needs --position-embedding-type yarn; add it, or leave it out"
                )
        if not args.yarn_correction_range_round_to_int:
            raise ValueError(
                "--no-yarn-correction-range-round-to-int needs --position-embedding-type yarn; add it, or "
                "leave it out"
            )
        return
    for name in needed:
        if getattr(args, name) is None:
            raise ValueError(f"--position-embedding-type yarn needs {flag_of(name)}; add it")
    for name, usual in BETAS_OF_YARN.items():
        setattr(args, name, getattr(args, name) or usual)
    if args.rotary_percent != 1.0 or args.use_rope_scaling or args.rotary_seq_len_interpolation_factor:
        raise ValueError(
            "--position-embedding-type yarn scales all channels itself; leave --rotary-percent, "
            "--use-rope-scaling and --rotary-seq-len-interpolation-factor out"
        )
