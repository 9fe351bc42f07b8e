"""Train on documents as they are, elastic helix and elastic 1F1B against packing, side by side in one run.

    torchrun --nproc-per-node 2 benchmarks/elastic_training.py --data-path data/stdlib

All run the same batches of whole documents on the same weights, batch by batch in turn: packed to the longest
document's length under 1F1B, by the plan of elastic 1F1B, and by that of elastic helix; which is first
alternates, and of several rounds the fastest counts. No document attends to another in any. The planner's
costs are measured first, on the ranks that train, with shorter sequences: they are quadratic in the length.
Nothing is recomputed where memory allows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from schedules import Sample, measure

from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.ranges import GIBIBYTES, LAYERS, REPEATS, SEED, Whole
from helixpipe.data.samples import ShuffledOrder
from helixpipe.elastic import ChunkCosts, ElasticPlan, costs_to_json, plan_batch
from helixpipe.elastic.baselines import packed_plan
from helixpipe.elastic.costs.fit import fit_costs
from helixpipe.elastic.costs.preset import profiled_chunk_costs
from helixpipe.elastic.search.round_planner import plan_rounds
from helixpipe.megatron_adapter.elastic_batch import ElasticBatch
from helixpipe.megatron_adapter.elastic_forward_backward import ElasticForwardBackward
from helixpipe.plan.cost_model import Workload
from helixpipe.plan.schedules.request import ATTENTION_RANGES
from helixpipe.profiling import profile_chunks
from helixpipe.runtime.trace import default_clock
from megatron.pretrain.data.variable_length import VariableLengthDataset
from megatron.pretrain.initialize import finalize, initialize
from megatron.pretrain.model import TrainingState, build_training_state
from megatron.pretrain.settings.arguments import parse_arguments
from megatron.pretrain.settings.job import JobSettings
from pretrain_gpt import forward_step

# At which the head is measured, see elastic-profile.
_PIECES_LENGTH = 2048
# Documents of the batch that only warms up: the first iteration allocates what all others use again.
_WARMUP_BATCH_SIZE = 4


PACKED, ELASTIC, HELIX = "packed", "elastic", "elastic-helix"


class Contender(NamedTuple):
    """A way to run a batch, and the model that it runs on."""

    plan: Callable[[list[int]], ElasticPlan]
    state: TrainingState


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
        contenders, settings = _contenders(options, _measured_costs(options))
        batches = _batches(options, settings, contenders)
        schedule = ElasticForwardBackward(clock=default_clock())
        warmup, *measured = batches
        for name, contender in contenders.items():
            _iteration(schedule, contender.state, warmup, name)
        rows: list[dict[str, Sample]] = [{} for _ in measured]
        for turn in range(options.rounds):
            first = turn % len(contenders)
            names = [*contenders][first:] + [*contenders][:first]
            for batch, row in zip(measured, rows, strict=True):
                for name in names:
                    found = _iteration(schedule, contenders[name].state, batch, name)
                    row[name] = min(found, row.get(name, found))
            fastest = {name: sum(row[name].elapsed_ms for row in rows) for name in contenders}
            _say(f"round {turn + 1}: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in fastest.items()))
        for batch, row in zip(measured, rows, strict=True):
            _say(_line(batch, row))
        _say(_summary(measured, rows))
    except ValueError as error:
        print(f"benchmark_elastic_training: error: {error}", file=sys.stderr)
        return 2
    finally:
        finalize()
    return 0


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(
        prog="benchmark_elastic_training", description="Compare elastic schedules with packing on one model."
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
    parser.add_argument("--rounds", type=REPEATS, default=3, help="over all batches; the fastest counts")
    parser.add_argument("--attention-range", choices=ATTENTION_RANGES, default="core", help="of helix")
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


def _contenders(options: argparse.Namespace, costs: ChunkCosts) -> tuple[dict[str, Contender], JobSettings]:
    """Both schedules' models; and the settings of one, which name the data."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "costs.json"
        path.write_text(costs_to_json(costs), encoding="utf-8")
        given = f"--elastic-costs {path} --memory-limit-gib {options.memory_limit_gib}"
        whole = _training_arguments(options, f"--pipeline-schedule {ELASTIC} {given}")
        cut = _training_arguments(
            options,
            f"--pipeline-schedule {HELIX} --recompute-levels none --attention-range "
            f"{options.attention_range} {given}",
        )
    pipelines, rounds = whole.elastic_job, cut.elastic_job
    assert pipelines is not None
    assert rounds is not None
    of_stages, of_segments = build_training_state(whole), build_training_state(cut)
    return {
        PACKED: Contender(lambda lengths: packed_plan(lengths, pipelines), of_stages),
        ELASTIC: Contender(lambda lengths: plan_batch(lengths, pipelines), of_stages),
        HELIX: Contender(lambda lengths: plan_rounds(lengths, rounds), of_segments),
    }, whole


def _batches(
    options: argparse.Namespace, settings: JobSettings, contenders: dict[str, Contender]
) -> list[Batch]:
    dataset = VariableLengthDataset(settings.data.dataset, options.max_seq_length)
    order = ShuffledOrder(len(dataset), options.seed)
    sizes = [_WARMUP_BATCH_SIZE] + [options.global_batch_size] * options.batches
    batches, taken = [], 0
    for size in sizes:
        chosen = order.samples(taken, size)
        taken += size
        sequences = [dataset[int(sample)].ids for sample in chosen]
        batches.append(Batch(sequences, _plans([len(ids) - 1 for ids in sequences], contenders)))
    return batches


def _plans(lengths: list[int], contenders: dict[str, Contender]) -> dict[str, ElasticPlan]:
    """Made by the first rank: a solver that its time limit ends need not find the same twice."""
    plans: list[Any] = [None]
    if dist.get_rank() == 0:
        plans = [{name: contender.plan(lengths) for name, contender in contenders.items()}]
    dist.broadcast_object_list(plans)
    return plans[0]


def _iteration(schedule: ElasticForwardBackward, state: TrainingState, batch: Batch, name: str) -> Sample:
    for chunk in state.model:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    return measure(
        schedule,
        lambda: schedule(
            forward_step_func=forward_step,
            data_iterator=iter([ElasticBatch(batch.plans[name], batch.sequences)]),
            model=state.model,
        ),
    )


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
    ratios = (f"{name} {row[PACKED].elapsed_ms / row[name].elapsed_ms:.3f}x" for name in (ELASTIC, HELIX))
    return " ".join([*parts, f"over packed: {', '.join(ratios)}"])


def _summary(batches: list[Batch], samples: list[dict[str, Sample]]) -> str:
    tokens = sum(batch.tokens for batch in batches)
    lines = [
        f"{'':14} {'tokens/s':>9} {'over packed':>11} {'median':>7} {'predicted':>9} {'bubble':>7} "
        f"{'computing':>9}"
    ]
    spent = {name: sum(row[name].elapsed_ms for row in samples) for name in batches[0].plans}
    predicted = {name: sum(batch.plans[name].prediction.time_ms for batch in batches) for name in spent}
    busy = {name: sum(sum(row[name].busy_ms) for row in samples) for name in spent}
    for name, ms in spent.items():
        median = statistics.median(row[PACKED].elapsed_ms / row[name].elapsed_ms for row in samples)
        bubble = statistics.median(row[name].bubble for row in samples)
        lines.append(
            f"{name:14} {tokens / ms * 1e3:9.0f} {spent[PACKED] / ms:10.3f}x {median:6.3f}x "
            f"{predicted[PACKED] / predicted[name]:8.3f}x {bubble:7.1%} {busy[name] / busy[PACKED] - 1:+9.1%}"
        )
    worst = max(abs(sample.loss / row[PACKED].loss - 1) for row in samples for sample in row.values())
    lines.append(
        f"{HELIX} over {ELASTIC}: {spent[ELASTIC] / spent[HELIX]:.3f}x; largest relative difference of a "
        f"batch's losses {worst:.1e}"
    )
    return "\n".join(lines)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
