"""Train one model under several schedules, side by side in one run, and print their ratios.

    torchrun --nproc-per-node 2 benchmarks/schedules.py --seq-length 4096

Every schedule gets the same weights, the same tokens and the same core attention. Iterations alternate
between the schedules, so that whatever else the machine does hits all of them alike; medians are printed.
The bubble is measured: the share of the ranks' time that no operation of the plan accounts for.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

warnings.filterwarnings("ignore")
logging.getLogger("megatron.core").setLevel(logging.ERROR)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.commands.ranges import LAYERS, RANKS, REPEATS, Whole  # noqa: E402
from helixpipe.data.prefix import DatasetInfo  # noqa: E402
from helixpipe.megatron_adapter.schedule import chunk_iterators, device, make_forward_backward  # noqa: E402
from helixpipe.plan.build import find_schedule  # noqa: E402
from helixpipe.plan.cost_model import Recompute, Workload, costs_of_plan  # noqa: E402
from helixpipe.plan.simulation.simulate import simulate  # noqa: E402
from helixpipe.profiling import profile  # noqa: E402
from helixpipe.runtime.gpu import barrier  # noqa: E402
from helixpipe.runtime.trace import default_clock  # noqa: E402
from megatron.pretrain.initialize import finalize, initialize  # noqa: E402
from megatron.pretrain.metrics import sum_losses  # noqa: E402
from megatron.pretrain.model import TrainingState, build_training_state  # noqa: E402
from megatron.pretrain.settings.arguments import parse_arguments  # noqa: E402
from megatron.pretrain.settings.job import JobSettings  # noqa: E402
from pretrain_gpt import forward_step  # noqa: E402

BASELINE = "1f1b"


class Contender(NamedTuple):
    """A schedule with a model of its own."""

    name: str
    settings: JobSettings
    schedule: Any
    state: TrainingState


class Sample(NamedTuple):
    """One iteration, over all ranks: milliseconds, share of idle time, busy milliseconds of each rank."""

    elapsed_ms: float
    bubble: float
    busy_ms: list[float]
    loss: float


def main() -> int:
    """Run the benchmark; 2 with one line on stderr if the arguments do not fit together."""
    try:
        options = _options()
        contenders = _contenders(options)
        samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
        for round_number in range(options.warmup + options.iterations):
            for contender in contenders:
                sample = run_iteration(contender, round_number)
                if round_number >= options.warmup:
                    samples[contender.name].append(sample)
        predicted = _predictions(options, contenders) if options.predict else {}
        if dist.get_rank() == 0:
            _report(options, contenders, samples)
            _report_predictions(predicted, samples)
    except ValueError as error:
        print(f"benchmark_schedules: error: {error}", file=sys.stderr)
        return 2
    finally:
        finalize()
    return 0


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog="benchmark_schedules", description="Compare pipeline schedules on one model.")
    parser.add_argument("--schedules", nargs="+", default=["1f1b", "interleaved", "helix"])
    parser.add_argument("--num-layers", type=LAYERS, default=8)
    parser.add_argument("--hidden-size", type=Whole(), default=256)
    parser.add_argument("--num-attention-heads", type=Whole(), default=4)
    parser.add_argument("--seq-length", type=Whole(), default=4096)
    parser.add_argument("--vocab-size", type=Whole(), default=1024)
    parser.add_argument(
        "--num-microbatches", type=Whole(), help="default: 2 per pipeline rank, a two-fold round"
    )
    parser.add_argument("--num-fold", type=Whole(), default=2)
    parser.add_argument("--num-slices", type=Whole(), default=4, help="of schedules that slice sequences")
    parser.add_argument("--tensor-model-parallel-size", type=RANKS, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--iterations", type=REPEATS, default=5, help="measured, per schedule")
    parser.add_argument("--warmup", type=Whole(least=0, most=10**6), default=1)
    parser.add_argument("--csv", type=Path, help="append one line per schedule")
    parser.add_argument(
        "--predict", action="store_true", help="profile first, and print what the planner predicts from it"
    )
    return parser


def _options() -> argparse.Namespace:
    options = build_parser().parse_args()
    find_ranks(options)
    if options.num_microbatches is None:
        options.num_microbatches = 2 * options.pipeline_ranks
    return options


def find_ranks(options: argparse.Namespace) -> None:
    """Note in ``options`` how many ranks torchrun has started, and how many of them are pipeline ranks."""
    options.ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if options.ranks % options.tensor_model_parallel_size:
        raise ValueError(
            f"--tensor-model-parallel-size {options.tensor_model_parallel_size} must divide the "
            f"{options.ranks} ranks; start a multiple of it with torchrun --nproc-per-node"
        )
    options.pipeline_ranks = options.ranks // options.tensor_model_parallel_size


def _contenders(options: argparse.Namespace) -> list[Contender]:
    contenders = []
    for name in options.schedules:
        if "virtual_stages" in find_schedule(name).options and options.pipeline_ranks == 1:
            raise ValueError(f"{name} needs two or more pipeline ranks; leave it out of --schedules")
        contenders.append(make_contender(options, name))
    return contenders


def make_contender(options: argparse.Namespace, schedule: str, label: str = "", extra: str = "") -> Contender:
    """A schedule with a model, built as the training program builds it; collective.

    Args:
        options: sizes, see :func:`build_parser`, and ``pipeline_ranks``.
        schedule: its name.
        label: what to call it; its name if empty.
        extra: more options of the training program.
    """
    settings = _training_arguments(options, schedule, extra)
    if not dist.is_initialized():
        initialize(settings)
    # Megatron keeps the number of virtual stages in a global; each contender sets its own.
    parallel_state.set_virtual_pipeline_model_parallel_world_size(settings.schedule.virtual_stages)
    made = make_forward_backward(settings.schedule.execution, settings.schedule.plan, default_clock())
    return Contender(label or schedule, settings, made, build_training_state(settings))


def _training_arguments(options: argparse.Namespace, schedule: str, extra: str) -> JobSettings:
    line = f"""--pipeline-schedule {schedule} --pipeline-model-parallel-size {options.pipeline_ranks}
        --tensor-model-parallel-size {options.tensor_model_parallel_size}
        --num-layers {options.num_layers} --hidden-size {options.hidden_size}
        --num-attention-heads {options.num_attention_heads} --seq-length {options.seq_length}
        --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
        --untie-embeddings-and-output-weights --micro-batch-size 1
        --global-batch-size {options.num_microbatches} --train-iters 1000 --lr 1e-4 --data-path random"""
    entry = find_schedule(schedule)
    if "num_fold" in entry.options:
        # Nothing is recomputed under any schedule.
        line += f" --num-fold {options.num_fold} --no-recompute-without-attention"
    if "num_slices" in entry.options and "--num-slices" not in extra:
        line += f" --num-slices {options.num_slices}"
    if "virtual_stages" in entry.options:
        line += " --num-layers-per-virtual-pipeline-stage 1"
    if options.bf16:
        line += " --bf16"
    line += f" {extra}"
    dataset = DatasetInfo("random", options.vocab_size, 0, 1, options.seq_length + 1, options.seq_length + 1)
    return parse_arguments(line.split(), dataset)


def _predictions(options: argparse.Namespace, contenders: list[Contender]) -> dict[str, float]:
    """Milliseconds of each schedule's iteration, simulated with times measured by ``profile``."""
    settings = contenders[0].settings
    parallel = settings.parallel
    workload = Workload(
        model=settings.workload.model,
        seq_length=settings.training.seq_length,
        tensor_parallel=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        element_bytes=2 if options.bf16 else 4,
    )
    pieces = profile(workload)
    return {
        name: simulate(plan, costs_of_plan(pieces, plan, Recompute.NONE)).iteration_ms
        for name, plan in ((contender.name, contender.schedule.plan) for contender in contenders)
    }


def _report_predictions(predicted: dict[str, float], samples: dict[str, list[Sample]]) -> None:
    for name, milliseconds in predicted.items():
        measured = statistics.median(sample.elapsed_ms for sample in samples[name])
        ratio = measured / milliseconds
        print(f"{name:12} predicted {milliseconds:9.1f} ms, measured over predicted {ratio:.3f}")


def _random_batches(settings: JobSettings, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (settings.training.micro_batch_size, settings.training.seq_length)
    while True:
        text = torch.randint(settings.data.dataset.vocab_size, (shape[0], shape[1] + 1), generator=generator)
        yield {
            "tokens": text[:, :-1],
            "labels": text[:, 1:],
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(shape[1]).expand(shape),
        }


def run_iteration(contender: Contender, round_number: int) -> Sample:
    """One training step; a round has the same tokens for all. Collective."""
    _, settings, schedule, state = contender
    parallel_state.set_virtual_pipeline_model_parallel_world_size(settings.schedule.virtual_stages)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    data = _random_batches(settings, round_number) if schedule.plan.read_by(rank) else None
    for chunk in state.model:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    state.optimizer.zero_grad()

    def step() -> list[Any]:
        losses: list[Any] = schedule(
            forward_step_func=forward_step,
            data_iterator=chunk_iterators(data, state.model),
            model=state.model,
            num_microbatches=settings.training.num_microbatches,
            seq_length=settings.training.seq_length,
            micro_batch_size=settings.training.micro_batch_size,
        )
        state.optimizer.step()
        return losses

    return measure(schedule, step)


def measure(schedule: Any, step: Callable[[], list[Any]]) -> Sample:
    """Time one iteration; collective.

    Args:
        schedule: with the trace of what it ran.
        step: runs the iteration, and returns what the loss function reported on this rank.
    """
    barrier()
    started = time.perf_counter()
    losses = step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed_ms = (time.perf_counter() - started) * 1e3
    table = torch.zeros(dist.get_world_size(), 5, dtype=torch.float64, device=device())
    mine = [elapsed_ms, schedule.trace.total_ms(), schedule.trace.busy_ms(), *sum_losses(losses)]
    table[dist.get_rank()] = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(table)
    elapsed, total, busy, loss_sums, tokens = table.T.tolist()
    bubble = 1.0 - sum(busy) / (len(busy) * max(total))
    return Sample(max(elapsed), bubble, busy, sum(loss_sums) / sum(tokens))


def _report(
    options: argparse.Namespace, contenders: list[Contender], samples: dict[str, list[Sample]]
) -> None:
    tokens = options.num_microbatches * options.seq_length
    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(
        f"{options.num_layers} layers, hidden {options.hidden_size}, sequence {options.seq_length}, "
        f"{options.num_microbatches} micro batches, pipeline {options.pipeline_ranks} x tensor "
        f"{options.tensor_model_parallel_size} on {device_name}; torch {torch.__version__}; "
        f"median of {options.iterations} iterations"
    )
    elapsed = {name: statistics.median(s.elapsed_ms for s in rows) for name, rows in samples.items()}
    reference = elapsed.get(BASELINE)
    print(
        f"{'schedule':12} {'ms':>9} {'tokens/s':>9} {'bubble':>7} {'over ' + BASELINE:>10}  busy ms per rank"
    )
    lines = []
    for contender in contenders:
        rows = samples[contender.name]
        milliseconds = elapsed[contender.name]
        bubble = statistics.median(s.bubble for s in rows)
        busy = [statistics.median(column) for column in zip(*(s.busy_ms for s in rows), strict=True)]
        ratio = f"{reference / milliseconds:.3f}x" if reference else "n/a"
        rate = tokens / milliseconds * 1e3
        print(
            f"{contender.name:12} {milliseconds:9.1f} {rate:9.0f} {100 * bubble:6.1f}% {ratio:>10}  "
            + " ".join(f"{value:.0f}" for value in busy)
        )
        percentiles = [f"{q:.1f}" for q in _fifths([s.elapsed_ms for s in rows])]
        lines.append(
            [contender.name, f"{milliseconds:.1f}", *percentiles, f"{bubble:.4f}", ratio, f"{rate:.0f}"]
        )
    spread = [
        abs(a.loss - b.loss) for rows in zip(*samples.values(), strict=True) for a in rows for b in rows
    ]
    print(f"largest difference between the schedules' losses in one iteration: {max(spread):.1e}")
    if options.csv:
        _append_csv(options, lines, device_name)


def _fifths(values: list[float]) -> tuple[float, float]:
    """The 20th and the 80th percentile; of one value, it."""
    if len(values) == 1:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=5)
    return cuts[0], cuts[3]


def _append_csv(options: argparse.Namespace, lines: list[list[str]], device_name: str) -> None:
    header = [
        "schedule", "median_ms", "p20_ms", "p80_ms", "bubble", "over_1f1b", "tokens_per_second", "layers",
        "hidden", "sequence", "micro_batches", "pipeline", "tensor", "device", "torch", "machine",
    ]  # fmt: skip
    setting = [
        options.num_layers, options.hidden_size, options.seq_length, options.num_microbatches,
        options.pipeline_ranks, options.tensor_model_parallel_size, device_name, torch.__version__,
        platform.machine(),
    ]  # fmt: skip
    is_new = not options.csv.exists()
    with options.csv.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        if is_new:
            writer.writerow(header)
        writer.writerows([*line, *setting] for line in lines)


if __name__ == "__main__":
    sys.exit(main())
