"""What is told of a run beside its own lines: TensorBoard, Weights & Biases, throughput, memory."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from helixpipe.commands.ranges import Whole

_TO_TENSORBOARD = (
    "log_timers_to_tensorboard", "log_validation_ppl_to_tensorboard", "log_memory_to_tensorboard",
    "log_world_size_to_tensorboard",
)  # fmt: skip


@dataclass(frozen=True)
class Watching:
    """What goes where.

    Attributes:
        tensorboard: folder of its event files; None for none.
        queue_size: values that may wait to be written there.
        interval: iterations between values.
        project, run, entity: of Weights & Biases; no project for none of it.
        wandb_folder: where its own files go.
        has_timers, has_perplexity, has_memory, has_loss_scale, has_world_size: which values are written
            beside those that always are.
        has_throughput: whether floating-point operations are counted.
        hardware: whose peak they are compared with; None: this GPU's.
        memory_history: file for the history of GPU memory; None for no history.
    """

    tensorboard: Path | None
    queue_size: int
    interval: int
    project: str
    run: str
    entity: str | None
    wandb_folder: Path | None
    has_timers: bool
    has_perplexity: bool
    has_memory: bool
    has_loss_scale: bool
    has_world_size: bool
    has_throughput: bool
    hardware: str | None
    memory_history: Path | None

    def check_packages(self) -> None:
        """``ValueError`` for a package that is asked for and not installed."""
        for flag, package, is_wanted in (
            ("--tensorboard-dir", "tensorboard", self.tensorboard is not None),
            ("--wandb-project", "wandb", bool(self.project)),
        ):
            if is_wanted and importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"{flag} needs the package {package}, which is not installed; pip install {package}, or "
                    f"leave {flag} out"
                )


def add_watching_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of arguments."""
    add = parser.add_argument_group("watching").add_argument
    add("--log-throughput", action="store_true", help="TFLOP/s per GPU, with half of attention's square")
    add("--log-params-norm", action="store_true", help="norm of the weights after each step")
    add("--log-num-zeros-in-grad", action="store_true", help="how many elements of the gradient are zero")
    add("--tensorboard-dir", type=Path, metavar="DIR", help="event files for TensorBoard")
    add("--tensorboard-queue-size", type=Whole(), default=1000, help="values that may wait to be written")
    add("--tensorboard-log-interval", type=Whole(), default=1, help="iterations between values")
    add("--log-timers-to-tensorboard", action="store_true", help="time and throughput of iterations")
    add("--log-validation-ppl-to-tensorboard", action="store_true", help="perplexity of evaluations")
    add("--log-memory-to-tensorboard", action="store_true", help="GPU memory of rank 0")
    add("--log-world-size-to-tensorboard", action="store_true", help="number of ranks")
    add(
        "--no-log-loss-scale-to-tensorboard",
        "--disable-log-loss-scale-to-tensorboard",
        action="store_false",
        dest="log_loss_scale_to_tensorboard",
        help="leave the loss scale out",
    )
    add("--wandb-project", default="", help="project of Weights & Biases (default: none)")
    add("--wandb-exp-name", default="", help="name of the run there")
    add("--wandb-entity", help="whose project it is (default: the account's)")
    add("--wandb-save-dir", type=Path, metavar="DIR", help="its own files (default: wandb beside --save)")
    add(
        "--record-memory-history",
        action="store_true",
        help="every allocation on this GPU, for torch's viewer",
    )
    add("--memory-snapshot-path", type=Path, metavar="FILE", help="where to (default: snapshot.pickle)")


def watching_of(args: argparse.Namespace) -> Watching:
    """What this job tells.

    Raises:
        ValueError: options that would be ignored.
    """
    for name in _TO_TENSORBOARD:
        if getattr(args, name) and args.tensorboard_dir is None and not args.wandb_project:
            raise ValueError(f"--{name.replace('_', '-')} needs --tensorboard-dir DIR")
    if bool(args.wandb_project) != bool(args.wandb_exp_name):
        raise ValueError("--wandb-project and --wandb-exp-name need each other")
    if not args.wandb_project and (args.wandb_entity or args.wandb_save_dir):
        raise ValueError("--wandb-entity and --wandb-save-dir need --wandb-project")
    if args.memory_snapshot_path is not None and not args.record_memory_history:
        raise ValueError("--memory-snapshot-path needs --record-memory-history")
    history = args.memory_snapshot_path or Path("snapshot.pickle")
    return Watching(
        tensorboard=args.tensorboard_dir,
        queue_size=args.tensorboard_queue_size,
        interval=args.tensorboard_log_interval,
        project=args.wandb_project,
        run=args.wandb_exp_name,
        entity=args.wandb_entity,
        wandb_folder=args.wandb_save_dir or args.save,
        has_timers=args.log_timers_to_tensorboard,
        has_perplexity=args.log_validation_ppl_to_tensorboard,
        has_memory=args.log_memory_to_tensorboard,
        has_loss_scale=args.log_loss_scale_to_tensorboard,
        has_world_size=args.log_world_size_to_tensorboard,
        has_throughput=args.log_throughput,
        hardware=args.hardware,
        memory_history=history if args.record_memory_history else None,
    )
