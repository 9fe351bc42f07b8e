"""Predictions beside published throughput: every row of ``anchors.json``, its error, median and worst.

    python benchmarks/anchors.py [--rows ID ...] [--attention-backend NAME]

No rate is fitted to a row: all are those of ``helixpipe/plan/cost_model/machines.py``, from data sheets and
benchmarks of kernels. What a publication leaves open is decided in the file, with the reasons.
"""

from __future__ import annotations

import statistics
import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helixpipe.commands.parser import ScriptParser  # noqa: E402
from helixpipe.json_input import read_json  # noqa: E402
from helixpipe.plan import Plan, ScheduleRequest  # noqa: E402
from helixpipe.plan.advise.context_parallel import Exchange, share_sequence  # noqa: E402
from helixpipe.plan.advise.job import GIB, RESERVED_GIB  # noqa: E402
from helixpipe.plan.cost_model import (  # noqa: E402
    HARDWARE,
    MODELS,
    Hardware,
    ModelShape,
    PieceCost,
    Pieces,
    Recompute,
    Workload,
    costs_of_plan,
    predict_pieces,
)
from helixpipe.plan.cost_model.analytic import pipeline_network  # noqa: E402
from helixpipe.plan.cost_model.hardware import ATTENTION_BACKENDS  # noqa: E402
from helixpipe.plan.cost_model.machines import hardware_from  # noqa: E402
from helixpipe.plan.cost_model.segments import rank_parameters, whole_layer_cost  # noqa: E402
from helixpipe.plan.schedules import SCHEDULES  # noqa: E402
from helixpipe.plan.simulation.costs import Costs, RankCost  # noqa: E402
from helixpipe.plan.simulation.memory import peak_bytes  # noqa: E402
from helixpipe.plan.simulation.simulate import simulate  # noqa: E402

ANCHORS = ROOT / "benchmarks" / "anchors.json"
# torch's FSDP: fp32 weight, gradient and two moments, all cut over the ranks.
_FSDP_BYTES = 16
# Of a stage's weights under FSDP while micro batches pass: bf16 weights, fp32 gradients, both whole.
_GATHERED_BYTES = 6


class Prediction(NamedTuple):
    """What is predicted for a row.

    Attributes:
        row: of the file.
        tokens_per_s: per GPU.
        peak_gib: on the worst rank, with what CUDA, NCCL and the allocator reserve.
        layout: sizes, and how many layers recompute, for people.
    """

    row: Mapping[str, Any]
    tokens_per_s: float
    peak_gib: float
    layout: str

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.tokens_per_s / self.row["tokens_per_s_gpu"] - 1

    @property
    def memory_error(self) -> float | None:
        """The same of memory; None where none was published."""
        published = self.row.get("peak_gib")
        return self.peak_gib / published - 1 if published else None


class _Layout(NamedTuple):
    tp: int
    cp: int
    pp: int
    dp: int

    def __str__(self) -> str:
        return " ".join(f"{name}{size}" for name, size in self._asdict().items() if size > 1) or "1 GPU"


def predict(row: Mapping[str, Any], attention_backend: str | None = None) -> Prediction:
    """The prediction for a row; of a row without a layout, that of the fastest that fits."""
    known = {**row, **row["assumed"]}
    machine = _machine(known, attention_backend)
    if "tp" in known:
        return _predict(row, known, machine, _layout_of(known))
    layouts = [_Layout(tp, known["cp"], 1, known["gpus"] // tp // known["cp"]) for tp in (1, 2, 4, 8)]
    found = [_predict(row, known, machine, layout) for layout in layouts]
    return max((one for one in found if one.peak_gib <= machine.memory_gib), key=lambda one: one.tokens_per_s)


def _machine(known: Mapping[str, Any], attention_backend: str | None) -> Hardware:
    named = known["hardware"]
    machine = HARDWARE[named] if isinstance(named, str) else hardware_from(named, f"of {known['id']}")
    return machine.with_attention(attention_backend or known["attention_backend"])


def _layout_of(known: Mapping[str, Any]) -> _Layout:
    tp, cp, pp = known["tp"], known.get("cp", 1), known.get("pp", 1)
    dp = known["gpus"] // (tp * cp * pp)
    return _Layout(tp, cp, pp, dp)


def _predict(
    row: Mapping[str, Any], known: Mapping[str, Any], machine: Hardware, layout: _Layout
) -> Prediction:
    model = MODELS[known["model"]]
    m = _num_microbatches(known, layout)
    virtual = known.get("virtual_stages", 1)
    # Llama 3.1's 126 layers leave the first and the last stage one less than the others.
    is_short = bool(model.num_layers % (layout.pp * virtual))
    pieces = _pieces(replace(model, num_layers=model.num_layers + 2 * is_short), known, machine, layout)
    plan = _plan(pieces.workload.model, layout.pp, m, virtual)
    limit_gib = machine.memory_gib - RESERVED_GIB

    def costs_with(full: int) -> Costs:
        levels = _levels(pieces.workload.model.num_layers, full)
        return _costs(pieces, plan, levels, known, layout, is_short=is_short)

    def peak_gib_with(full: int) -> float:
        return max(peak_bytes(plan, costs_with(full))) / GIB

    # As published, else in no layer, in one of every rank, in two and so on: the first that fits.
    num_layers = pieces.workload.model.num_layers
    counts = range(0, num_layers + 1, layout.pp)
    if known.get("recompute", "").startswith("full"):
        full = num_layers
    else:
        found = bisect_left(counts, True, key=lambda count: peak_gib_with(count) <= limit_gib)
        full = counts[min(found, len(counts) - 1)]
    peak_gib = peak_gib_with(full)
    iteration_ms = simulate(plan, costs_with(full)).iteration_ms
    size = pieces.workload.micro_batch_size
    tokens = known["seq"] * size * m * layout.dp
    label = (
        f"{layout}, m={m}" + (f" of {size}" if size > 1 else "") + (f" v={virtual}" if virtual > 1 else "")
    )
    return Prediction(
        row,
        tokens / (iteration_ms / 1e3) / known["gpus"],
        peak_gib + RESERVED_GIB,
        f"{label}, {full / num_layers:.0%} of layers recomputed" if full else label,
    )


def _num_microbatches(known: Mapping[str, Any], layout: _Layout) -> int:
    """Micro batches per replica and iteration."""
    if "num_microbatches" in known:
        return int(known["num_microbatches"])
    batch = int(known.get("global_batch", known.get("tokens_per_batch", 0) // known["seq"]))
    # A row without a batch, like those of FSDP, has one sequence per replica.
    return max(1, batch // layout.dp)


def _micro_batch_size(known: Mapping[str, Any]) -> int:
    """Sequences of a micro batch: a rank's batch over its micro batches, where that is given."""
    return int(known["local_batch"]) // int(known["num_microbatches"]) if "local_batch" in known else 1


def _pieces(model: ModelShape, known: Mapping[str, Any], machine: Hardware, layout: _Layout) -> Pieces:
    workload = Workload(
        model=model,
        seq_length=known["seq"],
        micro_batch_size=_micro_batch_size(known),
        tensor_parallel=layout.tp,
        data_parallel=layout.dp,
        distributed_optimizer=True,
        whole_logits=not known.get("chunked_loss", False),
        fp8_products=known["precision"].startswith("fp8"),
    )
    ring = pipeline_network(replace(workload, data_parallel=1), machine)
    shared = share_sequence(predict_pieces(workload, machine), Exchange.RING, layout.cp, ring)
    if known.get("consecutive"):
        # The last of c ranks attends to (c - 1/2) / c of all, where its share would be 1/2.
        longer = 2 - 1 / layout.cp
        core = shared.times["core"]
        slowest = PieceCost(core.forward * longer, core.backward * longer)
        shared = replace(shared, times={**shared.times, "core": slowest})
    return replace(shared, network=pipeline_network(shared.workload, machine))


def _plan(model: ModelShape, pp: int, m: int, virtual: int) -> Plan:
    options: dict[str, Any] = {"virtual_stages": virtual} if virtual > 1 else {}
    request = ScheduleRequest(num_layers=model.num_layers, num_ranks=pp, num_microbatches=m, **options)
    return SCHEDULES["interleaved" if virtual > 1 else "1f1b"].plan(request)


def _levels(num_layers: int, full: int) -> list[Recompute]:
    """Full recomputation in so many layers, spread evenly."""
    cuts = [layer * full // num_layers for layer in range(num_layers + 1)]
    return [Recompute.FULL if before < after else Recompute.NONE for before, after in pairwise(cuts)]


def _costs(
    pieces: Pieces,
    plan: Plan,
    levels: Sequence[Recompute],
    known: Mapping[str, Any],
    layout: _Layout,
    *,
    is_short: bool,
) -> Costs:
    costs = costs_of_plan(pieces, plan, levels)
    segments = dict(costs.segments)
    if is_short:
        for name, level in ((plan.segment_names[0], levels[0]), (plan.segment_names[-1], levels[-1])):
            stage, layer = segments[name], whole_layer_cost(pieces, level)
            segments[name] = replace(
                stage,
                forward=stage.forward - layer.forward,
                backward=stage.backward - layer.backward,
                weight=stage.weight - layer.weight,
                recompute=stage.recompute - layer.recompute,
                bytes=stage.bytes - layer.bytes,
            )
    if known.get("offload"):
        segments = {name: replace(cost, bytes=0) for name, cost in segments.items()}
    ranks = [
        RankCost(
            _static_bytes(pieces, known, layout, count),
            pieces.reduction_ms(count),
            pieces.optimizer_ms(count),
        )
        for count in _rank_parameters(pieces, plan, is_short=is_short)
    ]
    return replace(costs, segments=segments, ranks=tuple(ranks))


def _rank_parameters(pieces: Pieces, plan: Plan, *, is_short: bool) -> list[int]:
    """Weights on one GPU of each rank."""
    found = rank_parameters(pieces, plan)
    if is_short:
        layer = sum(pieces.workload.parameters[piece] for piece in ("qkv", "proj", "fc1", "fc2"))
        found[0] -= layer
        found[-1] -= layer
    return found


def _static_bytes(pieces: Pieces, known: Mapping[str, Any], layout: _Layout, parameters: int) -> int:
    if "fsdp" not in known:
        return pieces.workload.static_bytes(parameters)
    # All ranks but those of tensor and pipeline parallelism share a weight. Stages keep theirs gathered.
    gathered = _GATHERED_BYTES if layout.pp > 1 else 0
    return parameters * _FSDP_BYTES // (layout.dp * layout.cp) + parameters * gathered


def read_rows() -> list[dict[str, Any]]:
    """The rows of the file."""
    rows: list[dict[str, Any]] = read_json(ANCHORS, "anchors")["rows"]
    return rows


def flops_per_token(model: ModelShape, seq_length: int, *, whole_square: bool) -> float:
    """Model operations of training on one token: 6 per weight but the embedding's, and attention's.

    Publishers count attention's whole square, 12 L s h; half of it is computed.
    """
    weights = model.num_layers * model.layer_parameters + model.embedding_parameters
    square = 12.0 * model.num_layers * seq_length * model.query_size
    return 6.0 * weights + (square if whole_square else square / 2)


def table(rows: Sequence[Mapping[str, Any]], attention_backend: str | None = None) -> str:
    """All rows as Markdown, with the median and the worst error."""
    head = ["row", "layout", "attention", "published", "predicted", "error", "whole", "causal", "GiB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    found = [predict(row, attention_backend) for row in rows]
    for one in found:
        row = one.row
        model = MODELS[row["assumed"]["model"]]
        rates = [
            row["tokens_per_s_gpu"] * flops_per_token(model, row["seq"], whole_square=whole) / 1e12
            for whole in (True, False)
        ]
        memory = ""
        if one.memory_error is not None:
            memory = f"{row['peak_gib']} / {one.peak_gib:.0f} ({one.memory_error:+.0%})"
        cells = [
            row["id"],
            one.layout,
            attention_backend or row["assumed"]["attention_backend"],
            f"{row['tokens_per_s_gpu']}",
            f"{one.tokens_per_s:.0f}",
            f"{one.error:+.0%}",
            *(f"{rate:.0f}" for rate in rates),
            memory,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", summary(found)])


def kernels_table(rows: Sequence[Mapping[str, Any]], backends: Sequence[str]) -> str:
    """Errors of rows under each of some attention backends."""
    lines = ["| row | " + " | ".join(backends) + " |", "|---" * (len(backends) + 1) + "|"]
    for row in rows:
        errors = [f"{predict(row, backend).error:+.0%}" for backend in backends]
        lines.append(f"| {row['id']} | " + " | ".join(errors) + " |")
    return "\n".join(lines)


def balance_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Errors of rows whose sequences are shared: in early and late parts, and in consecutive ones."""
    lines = ["| row | an early and a late part | consecutive parts |", "|---|---|---|"]
    for row in rows:
        consecutive = {**row, "assumed": {**row["assumed"], "consecutive": True}}
        errors = [f"{predict(one).error:+.0%}" for one in (row, consecutive)]
        lines.append(f"| {row['id']} | " + " | ".join(errors) + " |")
    return "\n".join(lines)


def summary(found: Sequence[Prediction]) -> str:
    """Median and worst error of throughput, and of memory where it was published."""
    worst = max(found, key=lambda one: abs(one.error))
    median = statistics.median(abs(one.error) for one in found)
    text = (
        f"Throughput of {len(found)} rows: median error {median:.0%}, worst {worst.error:+.0%} "
        f"({worst.row['id']})."
    )
    memory = [abs(one.memory_error) for one in found if one.memory_error is not None]
    if memory:
        text += f" Memory of {len(memory)}: median {statistics.median(memory):.0%}, worst {max(memory):.0%}."
    return text


def build_parser() -> ScriptParser:
    """The options."""
    parser = ScriptParser(prog="anchors", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", nargs="+", metavar="ID", help="only these (default: all)")
    parser.add_argument(
        "--attention-backend", choices=ATTENTION_BACKENDS, help="in all rows, instead of the file's"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    rows = read_rows()
    known = [row["id"] for row in rows]
    for name in options.rows or ():
        if name not in known:
            parser.error(f"--rows: there is no row {name}; known: {', '.join(known)}")
    chosen = [row for row in rows if options.rows is None or row["id"] in options.rows]
    print(table(chosen, options.attention_backend))
    return 0


if __name__ == "__main__":
    sys.exit(main())
