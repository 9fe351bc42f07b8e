"""What ranks read, and how long they take, before the first sample of a corpus of 4 TB.

    python benchmarks/data_startup.py

The corpus is a sparse file: it takes no space, and its index is real. Three starts follow: of the first rank
of a node, which looks at the corpus and makes the indices; of the same rank again; and of any other rank.
Counted are bytes that were read or mapped, from the command line to the dataset.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import struct
import sys
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# As in training.
warnings.filterwarnings("ignore", module="megatron.core")
logging.getLogger("megatron.core").setLevel(logging.ERROR)

import numpy as np  # noqa: E402

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.commands.ranges import Real, Whole  # noqa: E402
from helixpipe.data.prefix import dataset_paths  # noqa: E402
from megatron.pretrain.checkpoint.comparison import settings_of  # noqa: E402
from megatron.pretrain.data.gpt import dataset_config  # noqa: E402
from megatron.pretrain.data.index_cache import build_datasets  # noqa: E402
from megatron.pretrain.settings.arguments import parse_arguments  # noqa: E402

JOB = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --micro-batch-size 1 --global-batch-size 1 "
    "--train-iters 1 --lr 1e-3 --split 99,1,0 --eval-iters 1 --tokenizer-type NullTokenizer "
    "--vocab-size 50000"
).split()
STARTS = (("first rank of a node", "0"), ("the same, again", "0"), ("any other rank", "1"))


class Start(NamedTuple):
    """One start: seconds, and bytes read and mapped."""

    seconds: float
    num_bytes: int


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog="benchmark_data_startup", description=__doc__)
    add = parser.add_argument
    add("--terabytes", type=Real(above=0.0, most=16.0), default=4.0, help="of tokens (default: %(default)s)")
    add("--documents", type=Whole(most=10**9), default=10**6, metavar="N", help="default: %(default)s")
    add("--seq-length", type=Whole(), default=2**20, metavar="N", help="default: %(default)s")
    add("--folder", type=Path, metavar="DIR", help="for the corpus; it is removed (default: a temporary one)")
    return parser


def main() -> None:
    """Print one line per start."""
    options = build_parser().parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        prefix = Path(folder) / "corpus"
        make_corpus(prefix, options)
        print(f"{'start':22} {'seconds':>8} {'bytes read':>14}")
        for name, local_rank in STARTS:
            found = _apart(prefix, options, local_rank)
            print(f"{name:22} {found.seconds:8.3f} {found.num_bytes:14,}")


def make_corpus(prefix: Path, options: argparse.Namespace) -> None:
    """Documents of one length, all of zeros."""
    paths = dataset_paths(prefix)
    tokens = int(options.terabytes * 1e12 / 2 / options.documents)
    if not 1 <= tokens < 2**31:
        raise SystemExit(f"benchmark_data_startup: error: --documents: {tokens} tokens each, not 1 to 2^31")
    lengths = np.full(options.documents, tokens, dtype="<i4")
    pointers = np.arange(options.documents, dtype="<i8") * (2 * tokens)
    with open(paths.idx, "wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, options.documents, options.documents + 1))
        for array in (lengths, pointers, np.arange(options.documents + 1, dtype="<i8")):
            stream.write(array.tobytes())
    with open(paths.bin, "wb") as stream:
        stream.truncate(2 * tokens * options.documents)


def _apart(prefix: Path, options: argparse.Namespace, local_rank: str) -> Start:
    """A start in a process of its own, forked: its imports are done."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_start, args=(prefix, options.seq_length, local_rank, theirs))
    process.start()
    theirs.close()
    try:
        found: Start = ours.recv()
    except EOFError:
        raise SystemExit("benchmark_data_startup: error: a start has failed, see above") from None
    process.join()
    return found


def _start(prefix: Path, seq_length: int, local_rank: str, report: Connection) -> None:
    os.environ["LOCAL_RANK"] = local_rank
    mapped, map_file = [], np.memmap

    def keep(*arguments: Any, **options: Any) -> np.memmap:
        """Or pages that were looked at would be gone before they are counted."""
        mapped.append(map_file(*arguments, **options))
        return mapped[-1]

    np.memmap = keep  # type: ignore[assignment,misc]
    before, started = _bytes_read(), time.perf_counter()
    settings = parse_arguments([*JOB, "--seq-length", str(seq_length), "--data-path", str(prefix)])
    settings_of(settings)  # what checkpoints say of the data
    datasets = build_datasets(dataset_config(settings.data, settings.training), [1, 1, 1], reads_data=True)
    seconds = time.perf_counter() - started
    assert datasets[0] is not None
    assert len(datasets[0])
    report.send(Start(seconds, _bytes_read() - before + _bytes_mapped(prefix.parent)))


def _bytes_read() -> int:
    """By this process, whether or not from memory."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def _bytes_mapped(folder: Path) -> int:
    """Of files in a folder, what mappings have in memory."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split()[0]:
            counts = str(folder) in line
        elif name == "Rss" and counts:
            total += 1024 * int(value.split()[0])
    return total


if __name__ == "__main__":
    main()
