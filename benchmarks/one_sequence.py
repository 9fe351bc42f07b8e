"""Train on one long sequence per iteration: sliced helix against what else there is, in one run.

    torchrun --nproc-per-node 2 benchmarks/one_sequence.py --seq-length 16384

1F1B and Seq1F1B, with several numbers of slices, train on the same sequence. Helix takes whole sequences, one
for each place in a round: its tokens per second are those of so many. All have the same model, weights and
core attention, and recompute nothing; iterations take turns, and medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist
from schedules import Contender, Sample, find_ranks, make_contender, run_iteration

from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.ranges import LAYERS, REPEATS, Whole
from megatron.pretrain.initialize import finalize

BASELINE = "1f1b"


class Entry(NamedTuple):
    """A schedule with its options, and how many sequences it trains on in an iteration."""

    label: str
    schedule: str
    num_sequences: int
    options: str


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog="benchmark_one_sequence", description="Train on one sequence per iteration.")
    add = parser.add_argument
    add("--num-layers", type=LAYERS, default=8)
    add("--hidden-size", type=Whole(), default=256)
    add("--num-attention-heads", type=Whole(), default=4)
    add("--seq-length", type=Whole(), default=16384)
    add("--vocab-size", type=Whole(), default=1024)
    add("--num-fold", type=Whole(), default=2)
    add("--num-slices", type=Whole(), nargs="+", default=[2, 4, 8], help="of Seq1F1B, each in turn")
    add("--bf16", action="store_true")
    add("--iterations", type=REPEATS, default=3, help="measured, per schedule")
    add("--warmup", type=Whole(least=0, most=10**6), default=1)
    return parser


def main() -> int:
    """Run the benchmark; 2 with one line on stderr if the arguments do not fit together."""
    options = build_parser().parse_args()
    try:
        options.tensor_model_parallel_size = 1
        find_ranks(options)
        entries = list(_entries(options))
        contenders = [_contender(options, entry) for entry in entries]
        samples: dict[str, list[Sample]] = {entry.label: [] for entry in entries}
        for number in range(options.warmup + options.iterations):
            for contender in contenders:
                sample = run_iteration(contender, number)
                if number >= options.warmup:
                    samples[contender.name].append(sample)
        if dist.get_rank() == 0:
            _report(options, entries, samples)
    except ValueError as error:
        print(f"benchmark_one_sequence: error: {error}", file=sys.stderr)
        return 2
    finally:
        finalize()
    return 0


def _entries(options: argparse.Namespace) -> Iterator[Entry]:
    yield Entry(BASELINE, "1f1b", 1, "")
    for count in options.num_slices:
        yield Entry(f"seq1f1b, {count} slices", "seq1f1b", 1, f"--num-slices {count}")
    yield Entry("sliced-helix", "sliced-helix", 1, "--head-placement spread")
    whole = options.pipeline_ranks * options.num_fold
    yield Entry(f"helix, {whole} sequences", "helix", whole, "--head-placement spread")


def _contender(options: argparse.Namespace, entry: Entry) -> Contender:
    own = argparse.Namespace(**{**vars(options), "num_microbatches": entry.num_sequences})
    return make_contender(own, entry.schedule, entry.label, entry.options)


def _report(options: argparse.Namespace, entries: list[Entry], samples: dict[str, list[Sample]]) -> None:
    print(
        f"{options.num_layers} layers, hidden {options.hidden_size}, sequence {options.seq_length}, "
        f"pipeline {options.pipeline_ranks}, fold {options.num_fold}; median of {options.iterations} "
        "iterations"
    )
    rates: dict[str, float] = {}
    for entry in entries:
        milliseconds = statistics.median(sample.elapsed_ms for sample in samples[entry.label])
        rates[entry.label] = entry.num_sequences * options.seq_length / milliseconds * 1e3
    print(f"{'schedule':22} {'tokens/s':>9} {'over ' + BASELINE:>10} {'bubble':>7}")
    for label, rate in rates.items():
        bubble = statistics.median(sample.bubble for sample in samples[label])
        print(f"{label:22} {rate:9.0f} {rate / rates[BASELINE]:9.3f}x {bubble:7.1%}")
    sliced = max((label for label in rates if label.startswith("seq1f1b")), key=rates.__getitem__)
    print(f"sliced-helix over {sliced}: {rates['sliced-helix'] / rates[sliced]:.3f}x")
    same = [samples[entry.label] for entry in entries if entry.num_sequences == 1]
    spread = max(abs(a.loss - b.loss) for rows in zip(*same, strict=True) for a in rows for b in rows)
    print(f"largest difference between the losses on the same sequence: {spread:.1e}")


if __name__ == "__main__":
    sys.exit(main())
