"""``train``: start the training program on this node's GPUs, or say what it would do."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from helixpipe.commands.ranges import RANKS, Whole

PROGRAM = "megatron.pretrain"


def add_parsers(add: Callable[..., Any]) -> None:
    """Add the command's parser."""
    parser = add(
        "train",
        help="train on this node under torchrun: pretrain_gpt.py from an installed package",
        description="Everything that is not listed here goes to the training program; python -m "
        f"{PROGRAM} --help lists that.",
    )
    add_argument = parser.add_argument
    add_argument(
        "--nproc-per-node", type=RANKS, metavar="N", help="ranks on this node (default: its GPUs, or 1)"
    )
    add_argument("--nnodes", type=RANKS, metavar="N", default=1, help="nodes (default 1)")
    add_argument("--node-rank", type=Whole(least=0, most=2**16), metavar="N", help="with --nnodes: this node")
    add_argument("--master-addr", metavar="HOST", help="with --nnodes: the first node")
    add_argument("--master-port", type=Whole(most=65535), metavar="PORT", help="with --nnodes: free on it")
    add_argument(
        "--dry-run",
        nargs="?",
        const="",
        metavar="HARDWARE",
        help="check everything, print layout, plan, memory, predicted time and the command; start nothing. "
        "HARDWARE: h20, h100, …, a file of rates or a profile (default: the job's --hardware, or this GPU)",
    )
    add_argument(
        "--vocab-size", type=Whole(), metavar="N", help="with --dry-run: words, where the data is elsewhere"
    )
    parser.set_defaults(run=_train, takes_more=True)


def _train(args: argparse.Namespace) -> None:
    if args.vocab_size is not None and "--tokenizer-type" in args.more:
        # A tokenizer's, which the program needs as well.
        args.more, args.vocab_size = [*args.more, "--vocab-size", str(args.vocab_size)], None
    ranks = _number_of_gpus() if args.nproc_per_node is None else args.nproc_per_node
    if args.dry_run is not None:
        _dry_run(args, ranks)
        return
    if args.vocab_size is not None:
        raise ValueError("--vocab-size is for --dry-run; the data says it")
    command = _command(args, ranks)
    sys.stdout.flush()
    # In the place of this process, so that signals reach torchrun.
    os.execv(command[0], command)


def _command(args: argparse.Namespace, ranks: int) -> list[str]:
    place = {
        "--node-rank": args.node_rank,
        "--master-addr": args.master_addr,
        "--master-port": args.master_port,
    }
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    if args.nnodes == 1:
        for flag, value in place.items():
            if value is not None:
                raise ValueError(f"{flag} needs --nnodes above 1; leave it out")
        words.append("--standalone")
    else:
        words += ["--nnodes", str(args.nnodes)]
        for flag, value in place.items():
            if value is None:
                raise ValueError(f"--nnodes {args.nnodes} needs {flag} on every node")
            words += [flag, str(value)]
    return [*words, "-m", PROGRAM, *args.more]


def _number_of_gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _dry_run(args: argparse.Namespace, ranks: int) -> None:
    # megatron.core warns at import about every optional package that is not installed.
    warnings.filterwarnings("ignore", module="megatron.core")
    from helixpipe.data.prefix import DatasetInfo
    from megatron.pretrain.dry_run import describe
    from megatron.pretrain.settings.arguments import parse_arguments

    os.environ.update(WORLD_SIZE=str(ranks * args.nnodes), RANK="0")
    stand_in = None
    if args.vocab_size is not None:
        # Of data that is elsewhere only this counts; the files are read when the job starts.
        stand_in = DatasetInfo(
            "", args.vocab_size, eod=0, num_documents=1, num_tokens=2**62, longest_document=1
        )
    job = parse_arguments(args.more, stand_in, makes_folders=False)
    for line in describe(job, args.dry_run or None):
        print(line)
    print(f"command: {shlex.join(_shown(args, ranks))}")


def _shown(args: argparse.Namespace, ranks: int) -> Sequence[str]:
    """The command as a user would write it; what a node says of itself left open."""
    words = ["torchrun", "--nproc-per-node", str(ranks)]
    if args.nnodes > 1:
        words += ["--nnodes", str(args.nnodes)]
        words += [] if args.node_rank is None else _command(args, ranks)[7:13]
    return [*words, "-m", PROGRAM, *args.more]
