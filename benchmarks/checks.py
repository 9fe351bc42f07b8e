"""What checks against flipped bits cost: layers that are computed twice, and sums of a checkpoint's tensors.

    python benchmarks/checks.py [--num-layers 4] [--hidden-size 256] [--iterations 40]

Trains on one rank with --check-layers-every 2, so that iterations with and without the check alternate in one
run, and prints the ratio of the shortest of each kind. Then sums, hashes and copies the same tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.ranges import LAYERS, Whole
from helixpipe.data.prepare.corpus import PreparationOptions, prepare_dataset
from megatron.pretrain.checkpoint.sums import bit_sum

ROOT = Path(__file__).resolve().parent.parent
_TENSORS = 16
_REPETITIONS = 5
# The first iterations build what later ones use.
_WARM_UP = 4


def main() -> int:
    """Measure and print."""
    options = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = iteration_times(Path(folder), options.num_layers, options.hidden_size, options.iterations)
    # Whatever else runs on the machine only adds to a time.
    without, checked = (min(times[parity::2]) for parity in (0, 1))
    print(
        f"layers twice: {checked:.1f} ms with, {without:.1f} ms without the check, ratio "
        f"{checked / without:.3f} in iterations that check; each computes one of {options.num_layers + 1} "
        "parts of the model twice"
    )
    tensors = [torch.randn(options.mebibytes * 2**18 // _TENSORS) for _ in range(_TENSORS)]
    summed = median_ms(lambda: [bit_sum(tensor) for tensor in tensors])
    hashed = median_ms(lambda: [hashlib.sha256(tensor.numpy()) for tensor in tensors])
    copied = median_ms(lambda: [tensor.clone() for tensor in tensors])
    print(
        f"sums of {options.mebibytes} MiB: {summed:.0f} ms, {summed / hashed:.3f} of SHA-256 and "
        f"{summed / copied:.2f} of a copy"
    )
    return 0


def iteration_times(folder: Path, num_layers: int, hidden_size: int, iterations: int) -> list[float]:
    """Milliseconds of the iterations of one job after the warm-up; every second one is checked."""
    prefix, source = folder / "text", Path(sysconfig.get_path("stdlib")) / "json"
    prepare_dataset(PreparationOptions([str(source)], str(prefix), pattern="*.py", tokenizer="byte"))
    metrics = folder / "metrics.jsonl"
    words = (
        f"--num-layers {num_layers} --hidden-size {hidden_size} --num-attention-heads 1 --seq-length 256 "
        f"--micro-batch-size 1 --global-batch-size 4 --train-iters {iterations + _WARM_UP} --lr 1e-3 "
        f"--data-path {prefix} --metrics-jsonl {metrics} --check-layers-every 2"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), *words.split()]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [row["elapsed_ms"] for row in rows[_WARM_UP:]]


def median_ms(work: Callable[[], object]) -> float:
    """Median time of some repetitions, after one that does not count."""
    times = []
    for _ in range(_REPETITIONS + 1):
        started = time.perf_counter()
        work()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(
        prog="benchmark_checks", description="Measure what checks against flipped bits cost."
    )
    add = parser.add_argument
    add("--num-layers", type=LAYERS, default=4)
    add("--hidden-size", type=Whole(most=65536), default=256)
    add("--iterations", type=Whole(least=2, most=10_000), default=40)
    add("--mebibytes", type=Whole(most=65536), default=256, help="to sum, hash and copy")
    return parser


if __name__ == "__main__":
    sys.exit(main())
