"""Learning rate and weight decay over the job, with Megatron's options, in iterations or in samples."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from helixpipe.commands.parser import flag_of
from helixpipe.commands.ranges import Real, Whole

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
_SAMPLES = Whole(most=2**63 - 1)
_OF_ITERATIONS = ("lr_decay_iters", "lr_wsd_decay_iters", "lr_warmup_iters")
_OF_SAMPLES = ("lr_decay_samples", "lr_wsd_decay_samples", "lr_warmup_samples")


@dataclass(frozen=True)
class LearningRate:
    """Arguments of Megatron's ``OptimizerParamScheduler``; lengths are in samples.

    Attributes:
        first, highest, lowest: rates at the start of the warm-up, at its end, and after the decay.
        warmup, decay: lengths from the first sample on.
        style: of the decay.
        last_decay, last_style: length and style of the decay at the end, for the style WSD.
        first_weight_decay, last_weight_decay: weight decay at both ends of the job.
        weight_decay_style: how it grows.
        job: length of the job.
    """

    first: float
    highest: float
    lowest: float
    warmup: float
    decay: int
    style: str
    last_decay: int | None
    last_style: str
    first_weight_decay: float
    last_weight_decay: float
    weight_decay_style: str
    job: int


def add_learning_rate_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of arguments."""
    group = parser.add_argument_group("length and learning rate")
    length = group.add_mutually_exclusive_group(required=True)
    length.add_argument("--train-iters", type=Whole())
    length.add_argument(
        "--train-samples", type=_SAMPLES, help="instead of --train-iters; whole batches count"
    )
    add = group.add_argument
    add("--lr", type=Real(least=0.0), required=True)
    add("--min-lr", type=Real(least=0.0), default=0.0)
    add("--decoupled-lr", type=Real(least=0.0), help="of embedding and head (default: --lr)")
    add("--decoupled-min-lr", type=Real(least=0.0), help="of embedding and head (default: --min-lr)")
    add("--lr-decay-style", choices=DECAY_STYLES, default="linear")
    add("--lr-decay-iters", type=Whole(), help="default: --train-iters")
    add("--lr-decay-samples", type=_SAMPLES, help="default: --train-samples")
    add("--lr-wsd-decay-style", choices=WSD_STYLES, default="exponential", help="of the last part of WSD")
    add("--lr-wsd-decay-iters", type=Whole(), help="length of the last part of WSD")
    add("--lr-wsd-decay-samples", type=_SAMPLES)
    add("--lr-warmup-fraction", type=Real(least=0.0, below=1.0), help="of --lr-decay-iters or -samples")
    add("--lr-warmup-iters", type=Whole(least=0), default=0)
    add("--lr-warmup-samples", type=Whole(least=0, most=2**63 - 1), default=0)
    add("--lr-warmup-init", type=Real(least=0.0), default=0.0, help="learning rate at the start")
    add("--weight-decay", type=Real(least=0.0), default=0.01)
    add("--start-weight-decay", type=Real(least=0.0), help="default: --weight-decay")
    add("--end-weight-decay", type=Real(least=0.0), help="default: --weight-decay")
    add("--weight-decay-incr-style", choices=("constant", "linear", "cosine"), default="constant")


def derive_length(args: argparse.Namespace) -> None:
    """Set the number of iterations, also where samples are given.

    Raises:
        ValueError: not even one batch of samples, or lengths in iterations beside samples.
    """
    unit, others = ("samples", _OF_ITERATIONS) if args.train_iters is None else ("iters", _OF_SAMPLES)
    for name in others:
        if getattr(args, name):
            wanted = name.rpartition("_")[0] + f"_{unit}"
            raise ValueError(f"{flag_of(name)} does not go with --train-{unit}; use {flag_of(wanted)}")
    if args.train_iters is None:
        args.train_iters = args.train_samples // args.global_batch_size
        if not args.train_iters:
            raise ValueError(
                f"--train-samples {args.train_samples} is less than one --global-batch-size "
                f"{args.global_batch_size}; use at least that"
            )
    elif args.lr_decay_iters is None:
        args.lr_decay_iters = args.train_iters


def learning_rate_of(args: argparse.Namespace) -> LearningRate:
    """The job's learning rate, checked; needs the length of the job.

    Raises:
        ValueError: one line: rates or lengths that contradict each other.
    """
    _check_rates(args)
    batch = args.global_batch_size
    if args.train_samples is None:
        job, decay = args.train_iters * batch, args.lr_decay_iters * batch
        warmup, last_decay = args.lr_warmup_iters * batch, args.lr_wsd_decay_iters
        last_decay = None if last_decay is None else last_decay * batch
    else:
        job, decay = args.train_samples, args.lr_decay_samples or args.train_samples
        warmup, last_decay = args.lr_warmup_samples, args.lr_wsd_decay_samples
    unit = "iters" if args.train_samples is None else "samples"
    if args.lr_warmup_fraction is not None:
        if warmup:
            raise ValueError(f"--lr-warmup-fraction and --lr-warmup-{unit} contradict each other; use one")
        warmup = args.lr_warmup_fraction * decay
    _check_lengths(args, unit, warmup, decay, last_decay)
    start, end = args.start_weight_decay, args.end_weight_decay
    return LearningRate(
        first=args.lr_warmup_init,
        highest=args.lr,
        lowest=args.min_lr,
        warmup=warmup,
        decay=decay,
        style=args.lr_decay_style,
        last_decay=last_decay,
        last_style=args.lr_wsd_decay_style,
        first_weight_decay=args.weight_decay if start is None else start,
        last_weight_decay=args.weight_decay if end is None else end,
        weight_decay_style=args.weight_decay_incr_style,
        job=job,
    )


def _check_rates(args: argparse.Namespace) -> None:
    if args.min_lr > args.lr:
        raise ValueError(f"--min-lr {args.min_lr} is above --lr {args.lr}; use at most that")
    if args.lr_warmup_init > args.lr:
        raise ValueError(f"--lr-warmup-init {args.lr_warmup_init} is above --lr {args.lr}; use at most that")
    highest, lowest = args.decoupled_lr, args.decoupled_min_lr
    if highest is None and lowest is not None:
        raise ValueError("--decoupled-min-lr needs --decoupled-lr")
    if highest is not None and (args.min_lr if lowest is None else lowest) > highest:
        raise ValueError(
            f"--decoupled-lr {highest} is below --decoupled-min-lr or --min-lr; use at least that"
        )
    grows = args.weight_decay_incr_style != "constant"
    ends = (args.start_weight_decay, args.end_weight_decay)
    if grows and None in ends:
        raise ValueError(
            f"--weight-decay-incr-style {args.weight_decay_incr_style} needs --start-weight-decay and "
            "--end-weight-decay"
        )
    if not grows and ends != (None, None):
        raise ValueError("--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear")
    if grows and ends[0] > ends[1]:
        raise ValueError(
            f"--start-weight-decay {ends[0]} is above --end-weight-decay {ends[1]}; use at most that"
        )


def _check_lengths(
    args: argparse.Namespace, unit: str, warmup: float, decay: int, last_decay: int | None
) -> None:
    step = args.global_batch_size if unit == "iters" else 1
    if warmup >= decay:
        raise ValueError(
            f"--lr-warmup-{unit} {warmup // step} must be smaller than --lr-decay-{unit} {decay // step}; "
            f"use at most {decay // step - 1}"
        )
    if (args.lr_decay_style == "WSD") != (last_decay is not None):
        raise ValueError(f"--lr-decay-style WSD and --lr-wsd-decay-{unit} need each other")
    if last_decay is not None and last_decay > decay - warmup:
        raise ValueError(
            f"--lr-wsd-decay-{unit} {last_decay // step} leaves no room for the warm-up within "
            f"--lr-decay-{unit} {decay // step}; use at most {int(decay - warmup) // step}"
        )
    if args.lr_decay_style != "WSD" and args.lr_wsd_decay_style != "exponential":
        raise ValueError("--lr-wsd-decay-style needs --lr-decay-style WSD")
