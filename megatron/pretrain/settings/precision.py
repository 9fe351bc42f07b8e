"""Number formats, the loss scaling of fp16, and bits that are the same every time."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

import torch

from helixpipe.commands.parser import flag_of
from helixpipe.commands.ranges import Real, Whole

# Megatron's defaults.
_SCALING = {
    "loss_scale": None,
    "initial_loss_scale": 2.0**32,
    "min_loss_scale": 1.0,
    "loss_scale_window": 1000,
    "hysteresis": 2,
}
# What NCCL reduces with in the same order every time.
_DETERMINISTIC_NCCL = ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS")


@dataclass(frozen=True)
class Precision:
    """How numbers are kept.

    Attributes:
        dtype: of weights, activations and their gradients.
        reduces_in_fp32: whether gradients are summed and reduced in fp32.
        loss_scale: of fp16, constant; None: it follows from overflows.
        initial_loss_scale, least_loss_scale: where it starts, and what it does not fall below.
        loss_scale_window: iterations without an overflow after which it doubles.
        hysteresis: overflows before it is halved.
        is_deterministic: whether gradients have the same bits every time.
    """

    dtype: torch.dtype
    reduces_in_fp32: bool
    loss_scale: float | None
    initial_loss_scale: float
    least_loss_scale: float
    loss_scale_window: int
    hysteresis: int
    is_deterministic: bool

    @property
    def is_scaled(self) -> bool:
        """Whether losses are scaled, so that an iteration can overflow and be left out."""
        return self.dtype is torch.float16


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of arguments."""
    group = parser.add_argument_group("precision")
    kinds = group.add_mutually_exclusive_group()
    kinds.add_argument(
        "--bf16", action="store_true", help="bfloat16 weights, fp32 gradients and optimizer; default fp32"
    )
    kinds.add_argument("--fp16", action="store_true", help="half precision with scaled losses")
    add = group.add_argument
    scale = Real(above=0.0, most=2.0**60)
    add("--loss-scale", type=scale, help="of fp16, constant (default: it follows from overflows)")
    add("--initial-loss-scale", type=scale, help="of fp16 (default 4294967296)")
    add("--min-loss-scale", type=scale, help="of fp16 (default 1)")
    add("--loss-scale-window", type=Whole(), help="iterations after which the scale doubles (default 1000)")
    add("--hysteresis", type=Whole(), help="overflows before the scale is halved (default 2)")
    add(
        "--accumulate-allreduce-grads-in-fp32",
        action="store_true",
        help="sum and reduce gradients in fp32, as with --bf16 anyway",
    )
    add("--grad-reduce-in-bf16", action="store_true", help="sum and reduce gradients in bfloat16")
    add(
        "--deterministic-mode",
        action="store_true",
        help="the same bits every time; sets CUBLAS_WORKSPACE_CONFIG, NCCL_ALGO and "
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO where they are not set",
    )


def precision_of(args: argparse.Namespace) -> Precision:
    """The job's precision.

    Raises:
        ValueError: options of another precision, or that contradict each other or the environment.
    """
    given = {name: getattr(args, name) for name in _SCALING if getattr(args, name) is not None}
    if given and not args.fp16:
        raise ValueError(f"{flag_of(next(iter(given)))} needs --fp16")
    if "loss_scale" in given and len(given) > 1:
        raise ValueError(f"--loss-scale is constant, {flag_of(list(given)[1])} is not for it; leave one out")
    if args.grad_reduce_in_bf16 and not args.bf16:
        raise ValueError("--grad-reduce-in-bf16 needs --bf16")
    if args.grad_reduce_in_bf16 and args.accumulate_allreduce_grads_in_fp32:
        raise ValueError("--grad-reduce-in-bf16 and --accumulate-allreduce-grads-in-fp32 exclude each other")
    values = _SCALING | given
    if values["min_loss_scale"] > values["initial_loss_scale"]:
        raise ValueError(
            f"--min-loss-scale {values['min_loss_scale']:g} is above --initial-loss-scale "
            f"{values['initial_loss_scale']:g}; use at most that"
        )
    if args.deterministic_mode:
        if args.cross_entropy_loss_fusion:
            raise ValueError("--cross-entropy-loss-fusion is not deterministic; leave one of both out")
        _check_environment()
    return Precision(
        dtype=torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32,
        reduces_in_fp32=not (args.fp16 or args.grad_reduce_in_bf16)
        or args.accumulate_allreduce_grads_in_fp32,
        loss_scale=values["loss_scale"],
        initial_loss_scale=values["initial_loss_scale"],
        least_loss_scale=values["min_loss_scale"],
        loss_scale_window=values["loss_scale_window"],
        hysteresis=values["hysteresis"],
        is_deterministic=args.deterministic_mode,
    )


def make_deterministic() -> None:
    """For this process, before its first product and message on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(True)


def _check_environment() -> None:
    for name, allowed in (
        ("NCCL_ALGO", _DETERMINISTIC_NCCL),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", ("0",)),
    ):
        value = os.environ.get(name)
        if value is not None and value not in allowed:
            raise ValueError(
                f"--deterministic-mode does not go with {name}={value}; unset it, or use "
                f"{' or '.join(allowed)}"
            )
