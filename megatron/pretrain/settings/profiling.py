"""``--profile``: which iterations of which ranks torch's profiler watches."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from helixpipe.commands.ranges import Whole

_DEFAULTS = {"profile_step_start": 10, "profile_step_end": 12, "profile_ranks": [0]}


@dataclass(frozen=True)
class ProfilingSettings:
    """What is profiled.

    Attributes:
        first, last: iterations, counted from 1.
        folder: where the traces go.
    """

    first: int
    last: int
    folder: Path


def add_profiling_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of arguments."""
    add = parser.add_argument_group("profiling").add_argument
    add(
        "--profile",
        action="store_true",
        help="write traces of torch's profiler into --trace-dir or --tensorboard-dir",
    )
    add(
        "--profile-step-start",
        type=Whole(least=0),
        metavar="N",
        help="finished iterations before profiling starts (default 10)",
    )
    add(
        "--profile-step-end",
        type=Whole(),
        metavar="N",
        help="finished iterations when it ends (default 12)",
    )
    add("--profile-ranks", type=Whole(least=0), nargs="+", metavar="RANK", help="default 0")


def profiling_settings(args: argparse.Namespace) -> ProfilingSettings | None:
    """What this rank profiles; None for nothing.

    Raises:
        ValueError: options that would be ignored, or iterations or ranks that the job does not have.
    """
    given = {name: getattr(args, name) for name in _DEFAULTS if getattr(args, name) is not None}
    if not args.profile:
        if given:
            flag = "--" + next(iter(given)).replace("_", "-")
            raise ValueError(f"{flag} needs --profile")
        return None
    # Megatron writes them beside what TensorBoard shows.
    folder = args.trace_dir or args.tensorboard_dir
    if folder is None:
        raise ValueError("--profile needs --trace-dir DIR or --tensorboard-dir DIR, where the traces go")
    values = {**_DEFAULTS, **given}
    start, end, ranks = (values[name] for name in _DEFAULTS)
    if start >= end:
        raise ValueError(
            f"--profile-step-start {start} must be below --profile-step-end {end}; use at most {end - 1}"
        )
    if end > args.train_iters:
        raise ValueError(
            f"--profile-step-end {end} is beyond --train-iters {args.train_iters}; use at most that"
        )
    beyond = [rank for rank in ranks if rank >= args.world_size]
    if beyond:
        raise ValueError(f"--profile-ranks {beyond[0]}: the job has ranks 0 to {args.world_size - 1}")
    return ProfilingSettings(start + 1, end, folder) if args.rank in ranks else None
