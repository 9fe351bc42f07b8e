"""Train on documents as they are, elastic against packing, side by side in one run.

    torchrun --nproc-per-node 2 benchmarks/elastic_training.py --data-path data/stdlib

Both run the same batches of whole documents through the same stages of one model, batch by batch in turn:
once by the elastic plan, once packed to the longest document's length under 1F1B; which of them is first
alternates. No document attends to another either way. The planner's costs are measured first, on the ranks
that train, with shorter sequences: they are quadratic in the length.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

warnings.filterwarnings("ignore")
logging.getLogger("megatron.core").setLevel(logging.ERROR)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.commands.ranges import GIBIBYTES, LAYERS, REPEATS, SEED, Whole  # noqa: E402
from helixpipe.data.samples import ShuffledOrder  # noqa: E402
from helixpipe.elastic import ChunkCosts, ElasticJob, ElasticPlan, costs_to_json, plan_batch  # noqa: E402
from helixpipe.elastic.baselines import packed_plan  # noqa: E402
from helixpipe.elastic.costs.fit import fit_costs  # noqa: E402
from helixpipe.elastic.costs.preset import profiled_chunk_costs  # noqa: E402
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch  # noqa: E402
from helixpipe.megatron_adapter.elastic_forward_backward import ElasticForwardBackward  # noqa: E402
from helixpipe.megatron_adapter.schedule import device  # noqa: E402
from helixpipe.plan.cost_model import Workload  # noqa: E402
from helixpipe.profiling import profile_chunks  # noqa: E402
from helixpipe.runtime.gpu import barrier  # noqa: E402
from helixpipe.runtime.trace import default_clock  # noqa: E402
from megatron.pretrain.data.variable_length import VariableLengthDataset  # noqa: E402
from megatron.pretrain.initialize import finalize, initialize  # noqa: E402
from megatron.pretrain.metrics import sum_losses  # noqa: E402
from megatron.pretrain.model import TrainingState, build_training_state  # noqa: E402
from megatron.pretrain.settings.arguments import parse_arguments  # noqa: E402
from megatron.pretrain.settings.job import JobSettings  # noqa: E402
from pretrain_gpt import forward_step  # noqa: E402

# At which the head is measured, see elastic-profile.
_PIECES_LENGTH = 2048
# Documents of the batch that only warms up: the first iteration allocates what all others use again.
_WARMUP_BATCH_SIZE = 4


class Sample(NamedTuple):
    """One iteration, over all ranks."""

    elapsed_ms: float
    busy_ms: float
    bubble: float
    loss: float


class Batch(NamedTuple):
    """One batch: its documents, and the plans that are compared."""

    sequences: list[torch.Tensor]
    plans: dict[str, ElasticPlan]

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return sum(len(sequence) - 1 for sequence in self.sequences)


def main() -> int:
    """Run the benchmark; 2 with one line on stderr if something does not fit."""
    options = build_parser().parse_args()
    try:
        initialize(_training_arguments(options, "--pipeline-schedule 1f1b"))
        costs = _measured_costs(options)
        state, settings = _elastic_state(options, costs)
        batches = _batches(options, settings)
        schedule = ElasticForwardBackward(clock=default_clock())
        samples: list[dict[str, Sample]] = []
        for number, batch in enumerate(batches):
            names = ("packed", "elastic") if number % 2 else ("elastic", "packed")
            row = {name: _iteration(schedule, state, batch, batch.plans[name]) for name in names}
            if number:
                samples.append(row)
                _say(_line(batch, row))
        _say(_summary(batches[1:], samples))
    except ValueError as error:
        print(f"benchmark_elastic_training: error: {error}", file=sys.stderr)
        return 2
    finally:
        finalize()
    return 0


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(
        prog="benchmark_elastic_training", description="Compare elastic pipelines with packing on one model."
    )
    parser.add_argument("--data-path", required=True, help="prefix that tools/prepare_data.py has written")
    parser.add_argument("--num-layers", type=LAYERS, default=4)
    parser.add_argument("--hidden-size", type=Whole(), default=128)
    parser.add_argument("--num-attention-heads", type=Whole(), default=4)
    parser.add_argument("--max-seq-length", type=Whole(), default=32768)
    parser.add_argument("--global-batch-size", type=Whole(), default=16)
    parser.add_argument("--memory-limit-gib", type=GIBIBYTES, default=8.0)
    parser.add_argument("--repeats", type=REPEATS, default=3, help="rounds of measuring what chunks cost")
    parser.add_argument("--profile-length", type=Whole(), default=8192, help="longest chunk that is measured")
    parser.add_argument("--batches", type=REPEATS, default=3, help="measured, after one that is not")
    parser.add_argument("--seed", type=SEED, default=1)
    return parser


def _training_arguments(options: argparse.Namespace, schedule: str) -> JobSettings:
    line = f"""{schedule} --pipeline-model-parallel-size {os.environ.get("WORLD_SIZE", "1")}
        --num-layers {options.num_layers} --hidden-size {options.hidden_size}
        --num-attention-heads {options.num_attention_heads} --seq-length {options.max_seq_length}
        --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
        --untie-embeddings-and-output-weights --calculate-per-token-loss --micro-batch-size 1
        --global-batch-size {options.global_batch_size} --train-iters 1000 --lr 1e-4"""
    return parse_arguments([*line.split(), "--data-path", options.data_path])


def _measured_costs(options: argparse.Namespace) -> ChunkCosts:
    settings = _training_arguments(options, "--pipeline-schedule 1f1b")
    longest = min(options.max_seq_length, options.profile_length)
    workload = Workload(
        model=settings.workload.model,
        seq_length=min(longest, _PIECES_LENGTH),
        element_bytes=4,
    )
    pieces, measured = profile_chunks(workload, longest, repeats=options.repeats)
    fit = fit_costs(measured, profiled_chunk_costs(pieces, dist.get_world_size()), 1)
    _say(f"costs of chunks, off on those held out: forward {fit.forward}, backward {fit.backward}")
    return fit.costs


def _elastic_state(options: argparse.Namespace, costs: ChunkCosts) -> tuple[TrainingState, JobSettings]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "costs.json"
        path.write_text(costs_to_json(costs), encoding="utf-8")
        limit = f"--memory-limit-gib {options.memory_limit_gib}"
        settings = _training_arguments(options, f"--pipeline-schedule elastic --elastic-costs {path} {limit}")
    return build_training_state(settings), settings


def _batches(options: argparse.Namespace, settings: JobSettings) -> list[Batch]:
    dataset = VariableLengthDataset(settings.data.dataset, options.max_seq_length)
    order = ShuffledOrder(len(dataset), options.seed)
    sizes = [_WARMUP_BATCH_SIZE] + [options.global_batch_size] * options.batches
    batches, taken = [], 0
    for size in sizes:
        chosen = order.samples(taken, size)
        taken += size
        sequences = [dataset[int(sample)].ids for sample in chosen]
        batches.append(Batch(sequences, _plans([len(ids) - 1 for ids in sequences], settings.elastic_job)))
    return batches


def _plans(lengths: list[int], job: ElasticJob) -> dict[str, ElasticPlan]:
    """Made by the first rank: a solver that its time limit ends need not find the same twice."""
    plans: list[Any] = [None]
    if dist.get_rank() == 0:
        plans = [{"packed": packed_plan(lengths, job), "elastic": plan_batch(lengths, job)}]
    dist.broadcast_object_list(plans)
    return plans[0]


def _iteration(
    schedule: ElasticForwardBackward, state: TrainingState, batch: Batch, plan: ElasticPlan
) -> Sample:
    for chunk in state.model:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    barrier()
    started = time.perf_counter()
    losses = schedule(
        forward_step_func=forward_step,
        data_iterator=iter([ElasticBatch(plan, batch.sequences)]),
        model=state.model,
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed_ms = (time.perf_counter() - started) * 1e3
    table = torch.zeros(dist.get_world_size(), 5, dtype=torch.float64, device=device())
    mine = [elapsed_ms, schedule.trace.total_ms(), schedule.trace.busy_ms(), *sum_losses(losses)]
    table[dist.get_rank()] = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(table)
    elapsed, total, busy, loss_sums, tokens = table.T.tolist()
    busy_ms = sum(busy) / len(busy)
    return Sample(max(elapsed), busy_ms, 1.0 - busy_ms / max(total), sum(loss_sums) / sum(tokens))


def _line(batch: Batch, row: dict[str, Sample]) -> str:
    longest = max(len(sequence) - 1 for sequence in batch.sequences)
    parts = [f"{batch.tokens} tokens, longest {longest}:"]
    for name, plan in batch.plans.items():
        sample = row[name]
        parts.append(
            f"{name} {len(plan.recipe.chunks)} chunks {sample.elapsed_ms:.0f} ms (predicted "
            f"{plan.prediction.time_ms:.0f}), bubble {100 * sample.bubble:.1f}% "
            f"({100 * plan.prediction.bubble:.1f}%);"
        )
    return " ".join([*parts, f"{row['packed'].elapsed_ms / row['elastic'].elapsed_ms:.3f}x"])


def _summary(batches: list[Batch], samples: list[dict[str, Sample]]) -> str:
    tokens = sum(batch.tokens for batch in batches)
    spent = {name: sum(row[name].elapsed_ms for row in samples) for name in ("packed", "elastic")}
    predicted = {
        name: sum(batch.plans[name].prediction.time_ms for batch in batches) for name in ("packed", "elastic")
    }
    rates = ", ".join(f"{name} {tokens / ms * 1e3:.0f} tokens/s" for name, ms in spent.items())
    computing = sum(row["elastic"].busy_ms for row in samples) / sum(row["packed"].busy_ms for row in samples)
    median = statistics.median(row["packed"].elapsed_ms / row["elastic"].elapsed_ms for row in samples)
    worst = max(abs(row["packed"].loss / row["elastic"].loss - 1) for row in samples)
    return (
        f"{rates}: elastic {spent['packed'] / spent['elastic']:.3f}x over packed (median batch "
        f"{median:.3f}x, predicted {predicted['packed'] / predicted['elastic']:.3f}x); elastic computes "
        f"{100 * (computing - 1):+.1f}% longer, the rest is idle time; largest relative "
        f"difference of a batch's losses {worst:.1e}"
    )


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
