"""What hashing adds to a save: the same files written with and without it, alternating.

    python benchmarks/checkpoint.py [--mebibytes 256] [--repetitions 5] [--folder DIR]

Prints milliseconds of each save, and the ratio of the medians. The folder should be on the file system
that checkpoints go to: hashing runs beside the writing, on a core of its own if there is one free.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.ranges import REPEATS, Whole
from megatron.pretrain.checkpoint import shards
from megatron.pretrain.checkpoint.files import digest
from megatron.pretrain.checkpoint.shards import HashingFile

_TENSORS = 16


class _NoHash:
    """In the place of SHA-256."""

    def update(self, block: bytes) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def save_ms(path: Path, tensors: list[torch.Tensor], make_hash: Callable[[], object]) -> float:
    """Time to write tensors as a rank writes its part of a checkpoint, up to the disk."""
    # Without our hash, torch's own checksums stay: a save as torch and Megatron do it.
    torch.serialization.set_crc32_options(make_hash is _NoHash)
    os.sync()
    start = time.perf_counter()
    with mock.patch.object(shards.hashlib, "sha256", make_hash), HashingFile(path) as stream:
        for tensor in tensors:
            torch.save(tensor, stream)  # type: ignore[arg-type]
    return (time.perf_counter() - start) * 1e3


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(
        prog="benchmark_checkpoint", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mebibytes", type=Whole(most=2**20), default=256)
    parser.add_argument("--repetitions", type=REPEATS, default=5)
    parser.add_argument("--folder", type=Path)
    return parser


def main() -> None:
    """Measure and print."""
    args = build_parser().parse_args()
    tensors = [torch.randn(args.mebibytes * 2**18 // _TENSORS) for _ in range(_TENSORS)]
    times: dict[str, list[float]] = {"without": [], "with": []}
    hashes: dict[str, Callable[[], object]] = {"without": _NoHash, "with": hashlib.sha256}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "shard"
        save_ms(path, tensors, _NoHash)
        for repetition in range(args.repetitions):
            # Whichever is first meets another state of the disk.
            for name in sorted(hashes, reverse=bool(repetition % 2)):
                times[name].append(save_ms(path, tensors, hashes[name]))
        start = time.perf_counter()
        digest(path)
        alone = (time.perf_counter() - start) * 1e3
    for name, measured in times.items():
        print(f"{name:>8} hash: {', '.join(f'{value:.0f}' for value in measured)} ms")
    ratio = statistics.median(times["with"]) / statistics.median(times["without"])
    rate = args.mebibytes / alone * 1e3
    print(
        f"medians, with / without: {ratio:.3f}; reading and hashing afterwards: {alone:.0f} ms, "
        f"{rate:.0f} MiB/s"
    )


if __name__ == "__main__":
    main()
