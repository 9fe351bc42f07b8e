"""``lengths``: how long the samples of a dataset are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helixpipe.commands.ranges import SEED, Whole

_DEFAULT_SEED = 1234  # of pretrain_gpt.py


def add_parsers(add: Callable[..., Any]) -> None:
    """Add the command's parser."""
    lengths = add("lengths", help="tell how long the samples of a dataset are, and write them for elastic")
    lengths.add_argument("prefix", metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx, as --data-path")
    lengths.add_argument(
        "--max-seq-length", type=Whole(), metavar="N", help="tokens after which samples are cut off"
    )
    lengths.add_argument("--output", type=Path, help="lengths.json: a list of tokens per sample")
    lengths.add_argument(
        "--global-batch-size",
        type=Whole(),
        metavar="N",
        help="take a random batch of N samples, as training draws it, instead of the whole dataset",
    )
    lengths.add_argument(
        "--seed", type=SEED, help=f"of the random batch, as for pretrain_gpt.py (default {_DEFAULT_SEED})"
    )
    lengths.set_defaults(run=_lengths)


def _lengths(args: argparse.Namespace) -> None:
    from helixpipe.data.index_file import check_index, open_index
    from helixpipe.data.samples import ShuffledOrder, document_samples
    from helixpipe.data.statistics import length_statistics
    from helixpipe.report.lengths import lengths_text

    if args.seed is not None and args.global_batch_size is None:
        raise ValueError("--seed chooses a random batch; give --global-batch-size, too")
    for suffix in (".bin", ".idx"):
        if args.prefix.endswith(suffix):
            meant = args.prefix.removesuffix(suffix)
            raise ValueError(f"{args.prefix}: give the prefix without the suffix, {meant}")
    index = open_index(f"{args.prefix}.idx")
    check_index(index)
    samples = document_samples(index, args.max_seq_length)
    lengths, name = samples.lengths, args.prefix
    print(lengths_text(name, samples, length_statistics(lengths), args.max_seq_length))
    if args.global_batch_size is not None:
        seed = _DEFAULT_SEED if args.seed is None else args.seed
        lengths = lengths[ShuffledOrder(len(samples), seed).samples(0, args.global_batch_size)]
        batch = length_statistics(lengths)
        print(
            f"\nA batch of {batch.samples:,}: {batch.tokens:,} tokens; median {batch.median:,}, "
            f"mean {batch.mean:,.0f}, 90% up to {batch.p90:,}, longest {batch.longest:,}"
        )
    if args.output:
        args.output.write_text(json.dumps(lengths.tolist()) + "\n", encoding="utf-8")
        print(f"Wrote {args.output}")
