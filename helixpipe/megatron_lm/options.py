"""Our options among those of a Megatron-LM script."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from helixpipe.commands.parser import Parser, flag_of
from helixpipe.commands.ranges import Real, Whole
from helixpipe.plan.build import find_schedule
from helixpipe.plan.cost_model import Recompute
from helixpipe.plan.execution import Execution
from helixpipe.plan.schedules import SCHEDULES, Schedule
from helixpipe.plan.schedules.request import ATTENTION_RANGES, HEAD_PLACEMENTS, ROUND_ORDERS

_OF_PLANS = (
    "num_fold", "attention_range", "head_placement", "round_order", "split_weight_gradients",
    "resend_context", "num_slices",
)  # fmt: skip
_OUTSIDE = (None, Execution.CHUNKS, Execution.ROUNDS)
_OF_WATCHING = ("hang_timeout_s", "failure_dir")
_OF_MODELS = ("recompute_levels", "mlp_chunk_size", "loss_chunk_size")


@dataclass(frozen=True)
class Options:
    """How a script is to be scheduled.

    Attributes:
        schedule: its name.
        plan: arguments of its plans that were given, as ``ScheduleRequest`` names them.
        recompute_levels: what backward passes compute again, as ``--recompute-levels`` says it.
        mlp_chunk_size, loss_chunk_size: see ``MemorySaving``.
        hang_timeout_s: longest wait or operation, in a step or between two; no limit if None.
        failure_dir: where stacks go after a hang.
    """

    schedule: str
    plan: dict[str, Any]
    recompute_levels: str
    mlp_chunk_size: int | None
    loss_chunk_size: int | None
    hang_timeout_s: float | None = None
    failure_dir: str | None = None

    @property
    def entry(self) -> Schedule:
        """What is to be known of the schedule."""
        return SCHEDULES[self.schedule]

    @property
    def chunks_per_rank(self) -> int:
        """Model chunks on each rank."""
        return 2 if self.entry.needs_untied_weights else 1

    @property
    def of_watching(self) -> str:
        """The first flag that was given of those that need somebody who watches the ranks; empty if none."""
        given = (flag_of(name) for name in _OF_WATCHING if getattr(self, name) is not None)
        return next(given, "")


def take_options(command_line: list[str]) -> Options | None:
    """Take our options out of a command line, so that the script's own parser does not meet them.

    Args:
        command_line: arguments without the program's name; ours are removed from it.

    Returns:
        None if no schedule is asked for.

    Raises:
        ValueError: one line: an option that does not go with the schedule, or a schedule that cannot run in
            another program.
    """
    found, rest = build_parser().parse_known_args(command_line)
    if found.pipeline_schedule is None:
        alone = [
            name for name in (*_OF_PLANS, *_OF_MODELS, *_OF_WATCHING) if getattr(found, name) is not None
        ]
        if alone:
            raise ValueError(
                f"{flag_of(alone[0])} needs --pipeline-schedule NAME; add it, or remove the flag"
            )
        return None
    options = _checked(found)
    command_line[:] = rest
    return options


def build_parser() -> Parser:
    """The parser alone."""
    parser = Parser(prog="helixpipe.megatron_lm", add_help=False)
    add = parser.add_argument
    add("--pipeline-schedule")
    add("--num-fold", type=Whole())
    add("--attention-range", choices=ATTENTION_RANGES)
    add("--head-placement", choices=HEAD_PLACEMENTS)
    add("--round-order", choices=ROUND_ORDERS)
    add("--split-weight-gradients", action=argparse.BooleanOptionalAction)
    add("--num-slices", type=Whole())
    add("--resend-context", action="store_true", default=None)
    add("--recompute-levels")
    add("--mlp-chunk-size", type=Whole())
    add("--loss-chunk-size", type=Whole())
    add("--hang-timeout-s", type=Real(least=0.0, most=1e7))
    add("--failure-dir")
    return parser


def _checked(found: argparse.Namespace) -> Options:
    name = found.pipeline_schedule
    entry = find_schedule(name)
    if entry.execution in _OUTSIDE:
        can = ", ".join(n for n, other in SCHEDULES.items() if other.execution not in _OUTSIDE)
        raise ValueError(f"{name} does not run inside Megatron-LM's training program; choose one of {can}")
    given = {option: getattr(found, option) for option in _OF_PLANS if getattr(found, option) is not None}
    for option in given:
        if option not in entry.options:
            raise ValueError(f"{flag_of(option)} does not apply to {name}; remove it")
    if entry.execution is None or not entry.execution.cuts_layers:
        for option in _OF_MODELS:
            if getattr(found, option):
                raise ValueError(f"{flag_of(option)} does not apply to {name} here; remove it")
    if entry.execution is Execution.MEGATRON:
        for option in _OF_WATCHING:
            if getattr(found, option) is not None:
                raise ValueError(
                    f"{flag_of(option)} does not apply to {name}, a schedule of Megatron's own, which nobody "
                    "watches here; remove it"
                )
    by_default = Recompute.WITHOUT_ATTENTION if entry.recomputes_by_default else Recompute.NONE
    return Options(
        name,
        given,
        found.recompute_levels or by_default.value,
        found.mlp_chunk_size,
        found.loss_chunk_size,
        found.hang_timeout_s,
        found.failure_dir,
    )
